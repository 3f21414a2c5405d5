"""What users get: its JSON form, listed log-probabilities, cut prompts, and arguments that ask for nothing."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from sempre.engine import LLM, AsyncLLM, ConfigError, RequestError, RequestOutput, RequestOutputKind, SamplingParams
from sempre.engine.flat_logprobs import FlatLogprobs
from sempre.engine.outputs import Logprob

SETTINGS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 8, "num_threads": 1, "multiprocessing": False}
PARAMS = SamplingParams(temperature=0.9, max_tokens=5, seed=3, logprobs=2, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS) as engine:
        yield engine


def one(llm: LLM, prompt: Any = "It is a truth", **changes: Any) -> RequestOutput:
    return llm.generate(prompt, dataclasses.replace(PARAMS, **changes), use_tqdm=False)[0]


def plain(value: object) -> bool:
    """Whether all of it is of Python's own types, which every JSON library takes."""
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return type(value) in (str, int, float, bool, type(None))


def test_outputs_have_a_json_form(llm: LLM) -> None:
    output = one(llm, n=2, prompt_logprobs=1, logprob_token_ids=[3], stop="e")
    for form in (dataclasses.asdict(output), output.to_dict()):
        assert plain(form)
        read = json.loads(json.dumps(form, allow_nan=False))
        assert read["outputs"][1]["token_ids"] == output.outputs[1].token_ids
        first = output.outputs[0].token_ids[0]
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        assert read["outputs"][0]["logprobs"][0][str(first)]["logprob"] == logprobs[0][first].logprob
    completion = output.outputs[0]
    assert completion.to_dict() == dataclasses.asdict(completion) == output.to_dict()["outputs"][0]
    score = llm.score("It is a truth")[0]
    assert plain(score.to_dict())
    assert json.loads(json.dumps(score.to_dict()))["total"] == score.total


def test_fields_of_vllm_without_anything_behind_them_can_be_read(llm: LLM) -> None:
    output = one(llm)
    found = [output.lora_request, output.encoder_prompt, output.encoder_prompt_token_ids, output.kv_transfer_params]
    assert [*found, output.outputs[0].lora_request] == [None] * 5
    assert "kv_transfer_params" not in output.to_dict()
    assert llm.get_world_size() == llm.get_world_size(include_dp=False) == 1


def test_metrics_have_a_json_form(llm: LLM) -> None:
    one(llm)
    forms = [dataclasses.asdict(metric) for metric in llm.get_metrics()]  # type: ignore[call-overload]
    assert plain(forms)
    assert {form["name"] for form in json.loads(json.dumps(forms))} >= {"sempre:num_requests_running"}


def test_a_logprob_is_what_dataclasses_take() -> None:
    logprob = Logprob(-1.5, 2, "x")
    assert dataclasses.asdict(logprob) == {"logprob": -1.5, "rank": 2, "decoded_token": "x"}  # type: ignore[call-overload]
    assert dataclasses.replace(logprob, rank=3) == Logprob(-1.5, 3, "x")  # type: ignore[type-var]
    assert [field.name for field in dataclasses.fields(logprob)] == ["logprob", "rank", "decoded_token"]  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"top_k": 5, "temperature": 0.7}, {"repetition_penalty": 1.5}], ids=str)
def test_listed_ids_are_as_in_the_whole_vocabulary(changes: dict[str, Any]) -> None:
    with LLM("tiny", max_logprobs=-1, **SETTINGS) as engine:
        whole = one(engine, logprobs=-1, **changes).outputs[0]
        only = one(engine, logprobs=None, logprob_token_ids=[700, 3, 9], **changes).outputs[0]
        assert one(engine, logprobs=2, logprob_token_ids=[700, 3, 9], **changes).outputs[0].logprobs == only.logprobs
        best = one(engine, **changes).outputs[0]
    assert only.token_ids == best.token_ids == whole.token_ids
    rows = [output.logprobs or [] for output in (whole, only, best)]
    assert [len(row) for row in rows] == [5] * 3
    for everything, few, usual in zip(*rows, strict=True):
        for row in (few, usual):
            # the rank of the sampled token and of those listed is their place in the vocabulary, as that of the best
            assert all(row[token_id] == everything[token_id] for token_id in row)
    assert [set(row) for row in rows[1]] == [{token, 700, 3, 9} for token in only.token_ids]
    assert only.cumulative_logprob == whole.cumulative_logprob


@pytest.mark.parametrize("start", [0, 2])
def test_candidates_of_a_prompt_are_as_in_the_whole_vocabulary(start: int) -> None:
    """Rows of unequal lengths, one id in the prompt itself, beside the prompt's own log-probabilities and alone."""
    with LLM("tiny", max_logprobs=-1, **SETTINGS) as engine:
        whole = one(engine, prompt_logprobs=-1)
        ids = whole.prompt_token_ids
        rows = [[700, token, 3][: 3 - i % 3] for i, token in enumerate(ids[1 + start :])]
        scored: dict[str, Any] = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": start}
        alone, beside, as_array = (
            one(engine, **(scored | more))
            for more in ({}, {"prompt_logprobs": 1}, {"n": 2, "prompt_logprob_token_ids": padded(rows)})
        )
    assert whole.prompt_logprobs is not None
    expected = [
        [row[token_id].logprob for token_id in listed] + [-math.inf] * (3 - len(listed))
        for row, listed in zip(whole.prompt_logprobs[1 + start :], rows, strict=True)
        if row is not None
    ]
    for output in (alone, beside, as_array):
        found = output.prompt_token_id_logprobs
        assert found is not None
        assert (found.shape, found.dtype) == ((len(ids) - 1 - start, 3), np.float32)
        assert found.tolist() == expected
        assert output.to_dict()["prompt_token_id_logprobs"] == expected
    assert alone.prompt_logprobs is None
    assert beside.prompt_logprobs is not None
    assert len(beside.prompt_logprobs) == len(ids)
    assert alone.outputs[0] == whole.outputs[0] == as_array.outputs[0]
    # outputs are compared with their matrices, and saved with them
    assert alone != dataclasses.replace(alone, prompt_token_id_logprobs=None)
    again = msgspec.convert(json.loads(alone.to_json())["prompt_token_id_logprobs"][0][:1], list[float])
    assert again == expected[0][:1]


def padded(rows: list[list[int]]) -> Any:
    return np.array([row + [-1] * (3 - len(row)) for row in rows], np.int32)


def test_candidates_that_do_not_fit_the_prompt(llm: LLM) -> None:
    for rows, start, text in [
        ([[3]], 0, "prompt_logprob_token_ids has 1 rows, but a prompt of 5 tokens has 4 scored rows"),
        ([[3]], 9, "prompt_logprob_token_ids has 1 rows, but a prompt of 5 tokens has 0 scored rows"),
        ([[3]] * 128, 0, "prompt_logprob_token_ids has 128 rows, but a prompt has at most 127 scored rows"),
        ([[4096]] * 4, 0, "Token id 4096 is out of vocabulary: prompt_logprob_token_ids"),
        ([[3] * 21] * 4, 0, "Requested 21 token ids per row in prompt_logprob_token_ids, which is greater than max"),
    ]:
        with pytest.raises(RequestError) as caught:
            one(llm, [5, 6, 7, 8, 9], prompt_logprob_token_ids=rows, prompt_logprob_start=start)
        assert str(caught.value).removeprefix("prompts[0]: ").startswith(text)
        assert caught.value.parameter == "prompt_logprob_token_ids"


def test_listed_ids_with_drafts() -> None:
    """Several rows a step: each has its own."""
    params = {"temperature": 0.0, "max_tokens": 24, "logprob_token_ids": [3, 700]}
    config = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    with LLM("tiny", **SETTINGS) as engine:
        alone = one(engine, "the sea, the sea, the sea, the", **params).outputs[0]
    with LLM("tiny", speculative_config=config, **SETTINGS) as engine:
        assert one(engine, "the sea, the sea, the sea, the", **params).outputs[0] == alone


def test_a_cut_prompt_is_the_shorter_one(llm: LLM) -> None:
    prompt = "It was a dark and stormy night, and the rain fell in torrents"
    ids = llm.get_tokenizer().encode(prompt)
    cut = one(llm, prompt, truncate_prompt_tokens=6)
    assert cut.prompt_token_ids == ids[-6:]
    assert cut.outputs[0] == one(llm, ids[-6:]).outputs[0]
    assert one(llm, ids, truncate_prompt_tokens=6, truncation_side="right").prompt_token_ids == ids[:6]
    assert len(one(llm, ids * 20, truncate_prompt_tokens=-1).prompt_token_ids) == 128 - 5


def test_arguments_that_ask_for_nothing(llm: LLM) -> None:
    expected = one(llm).outputs[0]
    nothing: dict[str, Any] = {"lora_request": None, "tokenization_kwargs": {}, "mm_processor_kwargs": None}
    assert llm.generate("It is a truth", PARAMS, use_tqdm=False, priority=[7], **nothing)[0].outputs[0] == expected
    assert llm.generate(["It is a truth"], PARAMS, lora_request=[None])[0].outputs[0] == expected
    messages = [{"role": "user", "content": "Who is there?"}]
    assert llm.chat(messages, PARAMS, False, **nothing) is not None
    for call in (lambda **keywords: llm.generate("a", PARAMS, **keywords), lambda **k: llm.chat(messages, PARAMS, **k)):
        for name in ("tokenization_kwargs", "mm_processor_kwargs"):
            with pytest.raises(RequestError, match=f"^{name} is not supported by this engine. Leave it out.") as caught:
                call(**{name: {"a": 1}})
            assert caught.value.parameter == name


def test_arguments_of_the_asynchronous_interface_that_ask_for_nothing() -> None:
    names = ("prompt_text", "tokenization_kwargs", "trace_headers", "data_parallel_rank")

    async def run() -> list[str]:
        texts = []
        async with AsyncLLM("tiny", **SETTINGS) as engine:
            async for output in engine.generate("a", PARAMS, "name", priority=3, **dict.fromkeys(names)):
                assert output.request_id == "name"
            for name in names:
                with pytest.raises(RequestError) as caught:
                    await anext(engine.generate("a", PARAMS, **{name: 0 if name == "data_parallel_rank" else "x"}))
                texts.append(str(caught.value))
        return texts

    assert asyncio.run(run()) == [f"{name} is not supported by this engine. Leave it out." for name in names]


def test_default_parameters_are_a_copy(llm: LLM) -> None:
    defaults = llm.get_default_sampling_params()
    defaults.temperature = 0.0
    assert llm.get_default_sampling_params() != defaults


def test_flat_logprobs_are_the_same_rows(llm: LLM) -> None:
    """In any form of output, for the prompt as well; a slice, a copy and JSON keep them."""
    expected, flat = (one(llm, n=2, prompt_logprobs=2, flat_logprobs=is_flat) for is_flat in (False, True))
    for rows, found in (
        (expected.outputs[1].logprobs, flat.outputs[1].logprobs),
        ([{}, *(expected.prompt_logprobs or [])[1:]], flat.prompt_logprobs),
    ):
        assert isinstance(found, FlatLogprobs)
        assert rows is not None
        assert len(rows) > 2
        assert list(found) == rows
        assert found == rows
        assert found != rows[:-1]
        assert (found[-1], found[1:3]) == (rows[-1], rows[1:3])
        assert isinstance(found[1:3], FlatLogprobs)
        assert copy.deepcopy(found) == found
        assert found.token_ids == [token_id for row in rows if row for token_id in row]
        assert found.logprobs == [entry.logprob for row in rows if row for entry in row.values()]
        assert [*zip(found.start_indices, found.end_indices, strict=True)][-1][1] == len(found.ranks)
        with pytest.raises(IndexError):
            found[len(rows)]
    assert plain(flat.to_dict())
    kept, same = (json.loads(output.to_json())["outputs"] for output in (flat, expected))
    assert kept == same
    with pytest.raises(ConfigError, match="flat_logprobs"):
        SamplingParams(flat_logprobs=1)  # type: ignore[arg-type]


def test_flat_logprobs_of_a_stream() -> None:
    async def streamed(kind: RequestOutputKind) -> list[Any]:
        params = dataclasses.replace(PARAMS, flat_logprobs=True, output_kind=kind)
        async with AsyncLLM("tiny", **SETTINGS) as engine:
            return [output.outputs[0] async for output in engine.generate("It is a truth", params)]

    parts = asyncio.run(streamed(RequestOutputKind.DELTA))
    whole = asyncio.run(streamed(RequestOutputKind.CUMULATIVE))
    assert all(isinstance(part.logprobs, FlatLogprobs) for part in (*parts, *whole))
    assert [row for part in parts for row in part.logprobs] == list(whole[-1].logprobs)
    lengths = [len(part.logprobs) for part in whole]
    assert lengths == [len(part.token_ids) for part in whole]  # earlier ones have not grown since
