"""Clients that others have written, each in an environment of its own, which are too large for every run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from server_process import ServerProcess

from sempre.engine.models import resolve_model

VARIABLE = "SEMPRE_CLIENT_ENVIRONMENTS"
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "client_libraries.py"
PACKAGES = {"litellm": "litellm", "langchain": "langchain-openai", "instructor": "instructor"}


def python_of(package: str) -> str:
    """The interpreter of the environment in which `package` is installed; skips the test without one."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        pytest.skip(f"{VARIABLE} does not name a folder of environments, each with the name of its package")
    path = Path(folder) / package / "bin" / "python"
    if not path.exists():
        pytest.skip(f"{path} does not exist; install {package} in such an environment")
    return str(path)


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=folder)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


def test_the_script_has_a_function_for_each_library() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(PACKAGES) <= functions


@pytest.mark.product
@pytest.mark.parametrize("library", PACKAGES)
def test_seeds_streams_and_forms(library: str, server: ServerProcess, tmp_path: Path) -> None:
    """The answer is the one that the same request gets without the library; another seed is the control."""
    lines = run([python_of(PACKAGES[library]), str(SCRIPT), library, server.url], tmp_path).splitlines()
    answer, departure, *verdicts = [line for line in lines if re.match(r"(answer|departure|again|streamed|ano)", line)]
    message = {"role": "user", "content": "Describe a ship."}
    body = {"model": "tiny", "messages": [message], "seed": 7, "max_tokens": 48}
    plain = server.http.post("/v1/chat/completions", json=body).json()
    assert ast.literal_eval(answer.removeprefix("answer: ")) == plain["choices"][0]["message"]["content"]
    found = json.loads(departure.removeprefix("departure: "))
    assert found["harbour"] in ("Nantucket", "Plymouth")
    assert found["day"] in ("Monday", "Tuesday")
    assert verdicts == ["again: equal", "streamed: equal", "another seed: different", "departure again: equal"]


@pytest.mark.product
def test_a_load_test_with_guidellm(server: ServerProcess, tmp_path: Path) -> None:
    """Every streamed answer under load is the one that the same request gets alone and not streamed."""
    backend = {"kind": "openai_http", "target": server.url, "model": "tiny", "extras": {"body": {"seed": 7}}}
    options = {
        "backend": json.dumps(backend),
        "profile": "kind=concurrent,streams=4",
        "constraint": "kind=max_requests,count=12",
        "tokenizer": f"kind=huggingface_auto,model={resolve_model('tiny').path}",
        "data": "kind=synthetic_text,prompt_tokens=24,output_tokens=16",
        "output": f"kind=json,path={tmp_path / 'out.json'}",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    run([python_of("guidellm"), "-m", "guidellm", "run", *flags, "--disable-console"], tmp_path)
    [benchmark] = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    found = benchmark["requests"]
    assert (len(found["successful"]), found["errored"], found["incomplete"]) == (12, [], [])
    for request in found["successful"]:
        body = json.loads(request["request_args"])["body"]
        alone = {name: value for name, value in body.items() if not name.startswith("stream")}
        assert alone["seed"] == 7
        answer = server.http.post("/v1/chat/completions", json=alone).json()
        assert request["output"] == answer["choices"][0]["message"]["content"]
        assert request["output_tokens"] == answer["usage"]["completion_tokens"] == 16
        other = server.http.post("/v1/chat/completions", json=alone | {"seed": 8}).json()
        assert request["output"] != other["choices"][0]["message"]["content"]
