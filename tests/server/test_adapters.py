"""Adapters over HTTP: named as model, listed, loaded and unloaded while the server runs, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapters import ATTENTION, save_adapter, tiny_modules
from server_process import ServerProcess

from sempre.engine import LLM, ConfigError, LoRARequest, SamplingParams
from sempre.engine.server.adapters import LoraModule, lora_modules

SETTINGS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 8, "num_threads": 1}
ADAPTERS: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 2}
FLAGS = ("--max-model-len", "128", "--max-num-seqs", "8", "--num-threads", "1", "--enable-lora", "--max-loras", "2")
FLAGS = (*FLAGS, "--max-lora-rank", "8", "--max-cpu-loras", "2")
BODY: dict[str, Any] = {"prompt": "It is a truth", "max_tokens": 8, "seed": 5, "logprobs": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / f"a{seed}", tiny_modules(ATTENTION), rank=8, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def adapted(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    second = json.dumps({"name": "second", "path": str(folders[1]), "base_model_name": "base"})
    modules = ("--lora-modules", f"first={folders[0]}", second, "--allow-runtime-lora-updating")
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", *FLAGS, *modules) as process:
        yield process


def expected(folders: list[Path]) -> list[tuple[str, str]]:
    """Text and fingerprint of the model itself, then with each adapter."""
    params = SamplingParams(max_tokens=8, seed=5, logprobs=1)
    requests = [None, *(LoRARequest(f"{n}", n, str(folder)) for n, folder in enumerate(folders, 1))]
    with LLM("tiny", **SETTINGS, **ADAPTERS) as llm:
        outputs = llm.generate([BODY["prompt"]] * len(requests), params, lora_request=requests)
    return [(output.outputs[0].text, output.fingerprint) for output in outputs]


def answer(server: ServerProcess, **fields: Any) -> tuple[str, str]:
    response = server.complete(**{**BODY, **fields})
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["model"] == (fields.get("model") or "tiny")
    return found["choices"][0]["text"], found["system_fingerprint"]


def test_the_model_names_the_adapter(adapted: ServerProcess, folders: list[Path]) -> None:
    wanted = expected(folders)
    assert len(set(wanted)) == 4
    names = [None, "first", "second"]
    assert [answer(adapted, model=name) for name in names] == wanted[:3]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda name: answer(adapted, model=name), names * 4))
    assert together == wanted[:3] * 4
    # as a stream, and in a conversation
    lines = adapted.http.post("/v1/completions", json={**BODY, "model": "first", "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted[1][0]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {wanted[1][1]}
    chat = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 6, "seed": 1}
    answers = [adapted.http.post("/v1/chat/completions", json={**chat, "model": name}).json() for name in names[1:]]
    assert [each["system_fingerprint"] for each in answers] == [wanted[1][1], wanted[2][1]]
    assert answers[0]["choices"][0]["message"] != answers[1]["choices"][0]["message"]


def test_models_are_listed_with_their_parent(adapted: ServerProcess, folders: list[Path]) -> None:
    cards = adapted.http.get("/v1/models").json()["data"]
    found = [(card["id"], card["root"], card["parent"]) for card in cards[:3]]
    assert found == [("tiny", "tiny", None), ("first", str(folders[0]), "tiny"), ("second", str(folders[1]), "base")]
    assert adapted.http.get("/v1/models/first").json() == cards[1]
    assert adapted.http.post("/tokenize", json={"model": "first", "prompt": "a"}).status_code == 200
    missing = adapted.complete(**BODY, model="third")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "The model `third` does not exist.")


def call(server: ServerProcess, what: str, **fields: Any) -> tuple[int, str]:
    response = server.http.post(f"/v1/{what}_lora_adapter", json=fields)
    is_error = response.headers["content-type"] == "application/json"
    return response.status_code, response.json()["error"]["message"] if is_error else response.text


def test_loading_and_unloading(adapted: ServerProcess, folders: list[Path], tmp_path: Path) -> None:
    wanted = expected(folders)
    path = str(folders[2])
    assert call(adapted, "load", lora_name="third", lora_path=path) == (
        200,
        "Success: LoRA adapter 'third' added successfully.",
    )
    assert answer(adapted, model="third") == wanted[3]
    status, text = call(adapted, "load", lora_name="third", lora_path=path)
    assert (status, "already been loaded" in text) == (400, True)
    assert call(adapted, "load", lora_name="third", lora_path=str(folders[0]), load_inplace=True)[0] == 200
    assert answer(adapted, model="third") == wanted[1]
    assert call(adapted, "load", lora_name="tiny", lora_path=path)[0] == 400
    refused = [
        ({"lora_name": "x", "lora_path": str(tmp_path / "no")}, "expected the folder of an adapter, found nothing"),
        ({"lora_name": "x", "lora_path": str(_too_high(tmp_path))}, "r: expected at most max_lora_rank=8, found 9"),
        ({"lora_name": "", "lora_path": path}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": path, "unheard": 1}, "unheard"),
    ]
    for fields, part in refused:
        status, text = call(adapted, "load", **fields)
        assert (status, part in text) == (400, True), text
    assert call(adapted, "unload", lora_name="third", lora_int_id=1)[0] == 404
    assert call(adapted, "unload", lora_name="third") == (200, "Success: LoRA adapter 'third' removed successfully.")
    assert call(adapted, "unload", lora_name="third") == (404, "The lora adapter 'third' cannot be found.")
    assert adapted.complete(**BODY, model="third").status_code == 404
    assert [answer(adapted, model=name) for name in (None, "first")] == wanted[:2]


def _too_high(folder: Path) -> Path:
    return save_adapter(folder / "high", tiny_modules(ATTENTION), rank=9)


def test_a_search_has_no_adapter(adapted: ServerProcess) -> None:
    response = adapted.complete(prompt="a", n=2, max_tokens=2, use_beam_search=True, model="first")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "use_beam_search")


def test_changes_need_a_flag(server: ServerProcess, folders: list[Path]) -> None:
    for what in ("load", "unload"):
        status, text = call(server, what, lora_name="a", lora_path=str(folders[0]))
        assert (status, "--allow-runtime-lora-updating" in text) == (404, True)


def test_an_adapter_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    flags = [*FLAGS, "--host", "127.0.0.1", "--port", "0", "--lora-modules", f"high={_too_high(tmp_path)}"]
    done = subprocess.run(
        [sys.executable, "-m", "sempre.engine", "serve", "tiny", *flags], capture_output=True, timeout=120, text=True
    )
    assert done.returncode != 0
    assert "adapter 'high'" in done.stderr
    assert "r: expected at most max_lora_rank=8, found 9" in done.stderr
    assert "Traceback" not in done.stderr


def test_forms_of_the_setting() -> None:
    found = lora_modules(["a=/x=y", '{"name": "b", "path": "/b", "base_model_name": "c"}'])
    assert found == [LoraModule("a", "/x=y"), LoraModule("b", "/b", "c")]
    for texts in (
        ["a"],
        ["=x"],
        ["a="],
        ["{"],
        ['{"name": "a"}'],
        ['{"name": "a", "path": "/", "x": 1}'],
        ["a=x", "a=y"],
    ):
        with pytest.raises(ConfigError, match="lora_modules"):
            lora_modules(texts)
