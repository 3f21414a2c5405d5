"""Checks, seeds and numbers of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sempre.engine.frontend.request_builder import RequestBuilder, RequestLimits
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.seeding import derive_request_seed
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError

LIMITS = RequestLimits(
    engine_seed=11,
    vocab_size=360,
    max_model_len=32,
    max_kv_tokens=1024,
    max_logprobs=20,
    eos_token_ids=[1],
    allows_priority=False,
)


@pytest.fixture
def builder(byte_level: Tokenizer) -> RequestBuilder:
    return RequestBuilder(byte_level, LIMITS)


def refusal(builder: RequestBuilder, prompt: Any, **params: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        builder.build(prompt, SamplingParams(**params))
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "The decoder prompt cannot be empty."),
        ("ab\ud800", {}, "prompt has no UTF-8 form: surrogates not allowed at character 2."),
        ({"prompt_token_ids": []}, {}, "The decoder prompt cannot be empty."),
        ([5, 360], {}, "Token id 360 is out of vocabulary: prompt_token_ids takes ids in [0, 360)."),
        ([-1], {}, "Token id -1 is out of vocabulary: prompt_token_ids takes ids in [0, 360)."),
        ([1.5], {}, "prompt_token_ids must contain only ints, got 1.5."),
        ([True], {}, "prompt_token_ids must contain only ints, got True."),
        (
            [3] * 32,
            {},
            "The decoder prompt (length 32) plus the number of requested output tokens (at least 1) is longer than "
            "the maximum model length of 32. Shorten the prompt or raise max_model_len.",
        ),
        (
            [3] * 30,
            {"min_tokens": 3},
            "min_tokens=3 does not fit behind the prompt (length 30): the maximum model length is 32.",
        ),
        (
            [3],
            {"logprobs": 21},
            "Requested sample logprobs of 21, which is greater than max allowed: 20. Raise max_logprobs of the engine.",
        ),
        (
            [3],
            {"prompt_logprobs": -1},
            "Requested prompt logprobs of 360, which is greater than max allowed: 20. "
            "Raise max_logprobs of the engine.",
        ),
        ([3], {"logit_bias": {360: 1}}, "Token id 360 is out of vocabulary: logit_bias takes ids in [0, 360)."),
        (
            [3],
            {"allowed_token_ids": [999]},
            "Token id 999 is out of vocabulary: allowed_token_ids takes ids in [0, 360).",
        ),
        ([3], {"stop_token_ids": [-5]}, "Token id -5 is out of vocabulary: stop_token_ids takes ids in [0, 360)."),
    ],
)
def test_refused(builder: RequestBuilder, prompt: Any, params: dict[str, Any], message: str) -> None:
    assert str(refusal(builder, prompt, **params)) == message


def test_prompt_beyond_the_kv_cache(byte_level: Tokenizer) -> None:
    builder = RequestBuilder(byte_level, dataclasses.replace(LIMITS, max_kv_tokens=16))
    assert str(refusal(builder, [3] * 16)) == (
        "The decoder prompt (length 16) plus the number of requested output tokens (at least 1) does not fit into the "
        "KV cache of 16 tokens. Shorten the prompt or raise kv_cache_memory_bytes."
    )


def test_priority_needs_the_policy(builder: RequestBuilder, byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        builder.build_all([[3]], SamplingParams(), [2])
    assert str(caught.value) == (
        "prompts[0]: Got priority 2 but priority scheduling is not enabled. Set scheduling_policy='priority'."
    )
    by_priority = RequestBuilder(byte_level, dataclasses.replace(LIMITS, allows_priority=True))
    assert by_priority.build_all([[3], [4]], SamplingParams(), [2, -1])[1].sequences[0].priority == -1


def test_error_names_the_prompt(builder: RequestBuilder) -> None:
    with pytest.raises(RequestError, match=r"^prompts\[1\]: Token id 400 is out of vocabulary") as caught:
        builder.build_all([[3], [400]], SamplingParams())
    assert (caught.value.parameter, caught.value.value) == ("prompt_token_ids", 400)


@pytest.mark.parametrize(
    ("params", "priority", "message"),
    [
        ([SamplingParams()], None, "The lengths of prompts and sampling_params must be the same, got 2 and 1."),
        (
            "x",
            None,
            "sampling_params must be SamplingParams or a list with one per prompt, got 'x'.",
        ),
        (SamplingParams(), [1], "The lengths of prompts and priority must be the same, got 2 and 1."),
        (SamplingParams(), [1, True], "priority must be int or a list with one per prompt, got [1, True]."),
    ],
)
def test_one_value_per_prompt(builder: RequestBuilder, params: Any, priority: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        builder.build_all(["a", "b"], params, priority)
    assert str(caught.value) == message


def test_params_of_another_type(builder: RequestBuilder) -> None:
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams, got dict"):
        builder.build("a", {"n": 1})  # type: ignore[arg-type]


def test_seeds_and_numbers(builder: RequestBuilder) -> None:
    first, second, third = builder.build_all(
        ["a", "b", "c"], [SamplingParams(), SamplingParams(n=3, seed=2**64 - 1), SamplingParams()]
    )
    assert [spec.request_id for spec in second.sequences] == ["1_0", "1_1", "1_2"]
    assert [spec.seed for spec in second.sequences] == [2**64 - 1, 0, 1]
    assert first.sequences[0].seed == derive_request_seed(11, 0)
    # The seed follows from the request's number, whatever `n` the ones before it had; the ordinal counts sequences.
    assert third.sequences[0].seed == derive_request_seed(11, 2)
    assert [spec.ordinal for request in (first, second, third) for spec in request.sequences] == [0, 1, 2, 3, 4]
    assert third.request_id == "2"


def test_a_refused_batch_takes_no_number(builder: RequestBuilder) -> None:
    with pytest.raises(RequestError):
        builder.build_all(["a", ""], SamplingParams())
    assert builder.build("a", SamplingParams()).sequences[0].seed == derive_request_seed(11, 0)


def test_lengths_fit_the_context(builder: RequestBuilder) -> None:
    params = SamplingParams(max_tokens=None)
    assert builder.build([3] * 10, params).sequences[0].params.max_tokens == 22
    assert builder.build([3] * 30, SamplingParams(max_tokens=9)).sequences[0].params.max_tokens == 2
    assert builder.build([3] * 10, SamplingParams(max_tokens=9)).sequences[0].params.max_tokens == 9


def test_end_tokens(builder: RequestBuilder) -> None:
    spec = builder.build([3], SamplingParams(stop_token_ids=[7])).sequences[0].params
    assert (spec.eos_token_ids, spec.stop_token_ids) == ([1], [7])
    spec = builder.build([3], SamplingParams(stop_token_ids=[7], ignore_eos=True)).sequences[0].params
    assert (spec.eos_token_ids, spec.stop_token_ids) == ([], [7])


def test_only_the_first_sibling_reports_the_prompt(builder: RequestBuilder) -> None:
    sequences = builder.build([3], SamplingParams(n=3, prompt_logprobs=2)).sequences
    assert [spec.params.prompt_logprobs for spec in sequences] == [2, None, None]


def test_whole_vocabulary_logprobs_when_allowed(byte_level: Tokenizer) -> None:
    builder = RequestBuilder(byte_level, dataclasses.replace(LIMITS, max_logprobs=-1))
    assert builder.build([3], SamplingParams(logprobs=-1)).sequences[0].params.logprobs == -1


def test_bad_words_with_and_without_a_space(builder: RequestBuilder, byte_level: Tokenizer) -> None:
    def ids(text: str) -> list[int]:
        return byte_level.encode(text, add_special_tokens=False)

    # " fox" is one token and "fox" are two; "x" behind a space is a space token and "x".
    assert (len(ids(" fox")), len(ids("fox"))) == (1, 2)
    assert ids(" x") == [*ids(" "), *ids("x")]
    spec = builder.build([3], SamplingParams(bad_words=["fox", " 😀", "x"])).sequences[0].params
    assert spec.bad_words_token_ids == [ids("fox"), ids(" fox"), ids("😀"), ids(" 😀"), ids("x")]


def test_numpy_token_ids(builder: RequestBuilder) -> None:
    request = builder.build(list(np.array([3, 4])), SamplingParams())
    assert request.prompt_token_ids == [3, 4]
    assert {type(token_id) for token_id in request.prompt_token_ids} == {int}


def test_salt_and_text(builder: RequestBuilder) -> None:
    request = builder.build({"prompt": "fox", "cache_salt": "s"}, SamplingParams())
    assert (request.prompt, request.sequences[0].cache_salt) == ("fox", "s")
    given = builder.build({"prompt": "shown", "prompt_token_ids": [9]}, SamplingParams())
    assert (given.prompt, given.prompt_token_ids) == ("shown", [9])


def test_more_than_the_vocabulary_keeps_all_of_it(builder: RequestBuilder) -> None:
    assert builder.build([3], SamplingParams(top_k=10**15)).sequences[0].params.top_k == LIMITS.vocab_size


def test_what_the_caller_changes_between_calls_counts(builder: RequestBuilder) -> None:
    params = SamplingParams(logit_bias={3: 1.0}, stop_token_ids=[7])
    builder.build([3], params)
    assert params.logit_bias is not None
    params.logit_bias[5] = 2.0
    assert builder.build([3], params).sequences[0].params.logit_bias == {3: 1.0, 5: 2.0}
    assert params.stop_token_ids is not None
    params.stop_token_ids.append(9)
    [request] = builder.build_all([[3]], params)
    assert request.sequences[0].params.stop_token_ids == [7, 9]


def test_shared_parameters_are_translated_once(builder: RequestBuilder) -> None:
    requests = builder.build_all(["a", "b"], SamplingParams(max_tokens=1, bad_words=["fox"]))
    assert requests[0].sequences[0].params is requests[1].sequences[0].params
