"""Adapters in Python: LoRARequest, one per call or per prompt, seeds, fingerprints, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import ATTENTION, save_adapter, tiny_modules

from sempre.engine import LLM, AsyncLLM, BeamSearchParams, ConfigError, LoRARequest, RequestError, SamplingParams
from sempre.engine.outputs import RequestOutput
from sempre.ipc.adapter_files import CONFIG_FILE, WEIGHTS_FILE

SETTINGS: dict[str, Any] = {"num_threads": 1, "max_model_len": 128, "max_num_seqs": 8, "device": "cpu"}
ADAPTERS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 2}
PARAMS = SamplingParams(max_tokens=8, seed=3, logprobs=2)
PROMPTS = ["It is a truth", "The captain", "A"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / f"a{seed}", tiny_modules(ATTENTION), rank=8, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def requests(folders: list[Path]) -> list[LoRARequest]:
    return [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(folders, 1)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", multiprocessing=False, **SETTINGS, **ADAPTERS) as engine:
        yield engine


def tokens(outputs: list[RequestOutput]) -> list[Any]:
    return [[output.outputs[0].token_ids, output.outputs[0].logprobs] for output in outputs]


def test_one_for_all_prompts_or_one_each(llm: LLM, requests: list[LoRARequest]) -> None:
    each = [tokens(llm.generate(PROMPTS, PARAMS, lora_request=request)) for request in (None, *requests[:2])]
    mixed = llm.generate(PROMPTS, PARAMS, lora_request=[requests[1], None, requests[0]])
    assert tokens(mixed) == [each[2][0], each[0][1], each[1][2]]
    assert [output.lora_request for output in mixed] == [requests[1], None, requests[0]]
    assert len({str(found) for found in each}) == 3
    ids = llm.enqueue(PROMPTS, PARAMS, lora_request=requests[0])
    assert [output.request_id for output in llm.wait_for_completion(use_tqdm=False)] == ids
    message = [{"role": "user", "content": "Hello"}]
    template = "{{ messages[0].content }}"
    plain, adapted = (
        llm.chat(message, PARAMS, lora_request=request, chat_template=template) for request in (None, requests[0])
    )
    assert tokens(plain) != tokens(adapted)


def test_the_adapter_joins_the_fingerprint(llm: LLM, requests: list[LoRARequest], folders: list[Path]) -> None:
    found = llm.generate(["A"] * 4, PARAMS, lora_request=[None, requests[0], requests[1], requests[0]])
    fingerprints = [output.fingerprint for output in found]
    assert fingerprints[0] == llm.fingerprint
    assert fingerprints[1] == fingerprints[3]
    assert len(set(fingerprints)) == 3
    # a name is not in it, nor a number
    other = LoRARequest("another name", 77, str(folders[0]))
    assert llm.generate("A", PARAMS, lora_request=other)[0].fingerprint == fingerprints[1]
    with LLM("tiny", multiprocessing=False, **SETTINGS) as plain:
        assert plain.fingerprint == llm.fingerprint


def test_a_seed_is_derived_from_the_adapter_too(requests: list[LoRARequest]) -> None:
    params = SamplingParams(max_tokens=2)
    with LLM("tiny", multiprocessing=False, **SETTINGS, **ADAPTERS) as engine:
        seeds = [
            engine.generate("A", params, lora_request=request)[0].outputs[0].seed
            for request in (None, requests[0], requests[1], None, requests[0])
        ]
    assert len(set(seeds)) == 5
    with LLM("tiny", multiprocessing=False, **SETTINGS, **ADAPTERS) as engine:
        mixed = engine.generate(["A"] * 3, params, lora_request=[requests[1], requests[0], None])
    assert [output.outputs[0].seed for output in mixed] == [seeds[2], seeds[1], seeds[0]]


def test_adding_and_removing(llm: LLM, requests: list[LoRARequest]) -> None:
    for number in llm.list_loras():
        llm.remove_lora(number)
    assert llm.collective_rpc("adapter_digests") == [[]]
    assert [llm.add_lora(requests[0]), llm.add_lora(requests[0]), llm.add_lora(requests[1])] == [True, False, True]
    assert llm.list_loras() == {1, 2}
    assert [llm.remove_lora(1), llm.remove_lora(1)] == [True, False]
    assert llm.list_loras() == {2}
    assert len(llm.collective_rpc("adapter_digests")[0]) == 1  # type: ignore[arg-type]
    assert llm.generate("A", PARAMS, lora_request=requests[0])[0].lora_request == requests[0]
    with pytest.raises(AttributeError, match="max_cpu_loras"):
        llm.pin_lora(1)


def test_files_that_change_are_another_adapter(llm: LLM, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", tiny_modules(ATTENTION), rank=8, seed=1)
    request = LoRARequest("changing", 41, str(folder))
    before = llm.generate("A", PARAMS, lora_request=request)[0]
    save_adapter(folder, tiny_modules(ATTENTION), rank=8, seed=2)
    after = llm.generate("A", PARAMS, lora_request=request)[0]
    assert before.fingerprint != after.fingerprint
    assert tokens([before]) != tokens([after])


def test_what_is_refused(llm: LLM, requests: list[LoRARequest], folders: list[Path], tmp_path: Path) -> None:
    expected = tokens(llm.generate(PROMPTS, PARAMS))
    llm.add_lora(requests[0])
    broken = save_adapter(tmp_path / "broken", tiny_modules(ATTENTION), rank=9)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / CONFIG_FILE).write_text("{}")
    refused: list[tuple[Any, str]] = [
        ("a0", "must be a LoRARequest"),
        ([requests[0]] * 2, "The lengths of prompts and lora_request must be the same, got 3 and 2"),
        (LoRARequest("b", 9, str(tmp_path / "nothing")), "'b': .*expected the folder of an adapter, found nothing"),
        (LoRARequest("b", 9, str(empty)), f"{WEIGHTS_FILE}: file not found"),
        (LoRARequest("b", 9, str(broken)), "config.json: r: expected at most max_lora_rank=8, found 9"),
        (LoRARequest("b", 1, str(folders[1])), "1 is the number of the adapter 'a0'"),
    ]
    for request, text in refused:
        with pytest.raises(RequestError, match=text):
            llm.generate(PROMPTS, PARAMS, lora_request=request)
    assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
    replaced = LoRARequest("b", 1, str(folders[1]), load_inplace=True)
    assert llm.generate("A", PARAMS, lora_request=replaced)[0].lora_request == replaced
    llm.remove_lora(1)
    with pytest.raises(RequestError, match="lora_request"):
        llm.beam_search("A", BeamSearchParams(beam_width=2, max_tokens=2), lora_request=requests[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("", 1, "/a"), "lora_name must be a non-empty string"),
        (("a", 0, "/a"), "lora_int_id must be at least 1, got 0"),
        (("a", 1, ""), "lora_path must be a non-empty string"),
        (("a", 1, "/a", None, {}), "tensorizer_config_dict is not supported"),
    ],
)
def test_a_request_names_its_wrong_field(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        LoRARequest(*arguments)
    with pytest.raises(ConfigError):
        LoRARequest("a", "1", "/a")  # type: ignore[arg-type]


def test_it_is_where_users_of_vllm_import_it_from() -> None:
    from sempre.lora.request import LoRARequest as ByPath

    assert ByPath is LoRARequest
    request = LoRARequest("a", 2, "/a")
    assert (request.name, request.adapter_id, request.path) == ("a", 2, "/a")


def test_an_engine_without_adapters_refuses_them(requests: list[LoRARequest]) -> None:
    with LLM("tiny", multiprocessing=False, **SETTINGS) as engine:
        with pytest.raises(RequestError, match="needs an engine with enable_lora=True"):
            engine.generate("A", PARAMS, lora_request=requests[0])
        assert engine.generate("A", PARAMS)[0].finished


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_loras": 2}, "max_loras=2 has no effect without enable_lora"),
        ({"enable_lora": True, "max_loras": 3, "max_cpu_loras": 2}, "max_cpu_loras=2 must be at least max_loras=3"),
        ({"enable_lora": True, "max_lora_rank": 1024}, "max_lora_rank"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LLM("tiny", multiprocessing=False, **SETTINGS, **settings)


def test_outputs_hold_their_adapter_and_are_plain_data(llm: LLM, requests: list[LoRARequest]) -> None:
    [output] = llm.generate("A", PARAMS, lora_request=requests[0])
    assert json.loads(output.to_json())["lora_request"]["lora_name"] == "a0"


def test_asynchronous(requests: list[LoRARequest], llm: LLM) -> None:
    expected = [tokens(llm.generate("A", PARAMS, lora_request=request)) for request in (None, *requests)]

    async def run() -> list[Any]:
        async with AsyncLLM("tiny", multiprocessing=False, **SETTINGS, **ADAPTERS) as engine:

            async def last(request: LoRARequest | None) -> Any:
                async for output in engine.generate("A", PARAMS, lora_request=request):
                    found = output
                return tokens([found])

            with pytest.raises(RequestError, match="'a0' is not loaded: call add_lora first"):
                engine.stream(["A"], PARAMS, lora_request=requests[0])
            found = await asyncio.gather(*(last(request) for request in (None, *requests)))
            assert await engine.list_loras() == {1, 2, 3}
            assert await engine.add_lora(requests[0]) is False
            streamed = await engine.stream(["A"], PARAMS, lora_request=requests[0]).finished()
            assert tokens(streamed) == found[1]
            assert [await engine.remove_lora(1), await engine.remove_lora(1)] == [True, False]
            return found

    assert asyncio.run(run()) == expected
