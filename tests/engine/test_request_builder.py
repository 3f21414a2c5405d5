"""Checks, seeds and numbers of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sempre.engine.frontend.limits import RequestLimits, cut
from sempre.engine.frontend.request_builder import PreparedRequest, RequestBuilder
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.scheduling.limits import Limits
from sempre.engine.seeding import derive_request_seed, distribution_digest, request_digest
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import RequestSpec, SamplingSpec

LIMITS = RequestLimits(
    engine_seed=11,
    vocab_size=360,
    max_model_len=32,
    max_kv_tokens=1024,
    max_logprobs=20,
    eos_token_ids=[1],
)


@pytest.fixture
def builder(byte_level: Tokenizer) -> RequestBuilder:
    return RequestBuilder(byte_level, LIMITS)


def derived(request: PreparedRequest, count: int = 0) -> int:
    """The seed of a request without one, which `count` equal ones came before."""
    digest = request_digest(distribution_digest(request.sequences[0].params), request.prompt_token_ids)
    return derive_request_seed(LIMITS.engine_seed, digest, count)


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
            "This model's maximum context length is 32 tokens. The decoder prompt (length 32) plus the number of "
            "requested output tokens (at least 1) is longer than the maximum model length of 32. Make sure that "
            "`max_model_len` is no smaller than the number of text tokens (prompt + requested output tokens). "
            "Please reduce the length of the prompt or raise max_model_len.",
        ),
        (
            [3] * 30,
            {"min_tokens": 3},
            "min_tokens must be less than or equal to max_tokens=2, got 3: the prompt (length 30) leaves no more of "
            "the maximum model length of 32.",
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
        "This model's maximum context length is 32 tokens. The decoder prompt (length 16) plus the number of "
        "requested output tokens (at least 1) does not fit into the KV cache of 16 tokens. "
        "Shorten the prompt or raise kv_cache_memory_bytes."
    )


@pytest.mark.parametrize(("length", "max_kv_tokens"), [(0, 64), (32, 64), (40, 64), (16, 16), (31, 16)])
def test_the_coordinator_says_the_same_of_a_prompt(byte_level: Tokenizer, length: int, max_kv_tokens: int) -> None:
    """It checks what reaches it by another way, too."""
    builder = RequestBuilder(byte_level, dataclasses.replace(LIMITS, max_kv_tokens=max_kv_tokens))
    limits = Limits(LIMITS.max_model_len, max_kv_tokens // 4, 4, 8, 64)
    spec = RequestSpec(
        request_id="a", prompt_token_ids=[3] * length, params=SamplingSpec(max_tokens=8), seed=7, ordinal=0
    )
    with pytest.raises(RequestError) as refused:
        limits.check_prompt(spec)
    assert str(refused.value) == str(refusal(builder, [3] * length))


def test_priorities(builder: RequestBuilder) -> None:
    requests = builder.build_all([[3], [4]], SamplingParams(), [2, -1])
    assert [request.sequences[0].priority for request in requests] == [2, -1]
    assert [r.sequences[0].priority for r in builder.build_all([[3], [4]], SamplingParams(), 5)] == [5, 5]
    with pytest.raises(RequestError, match=r"prompts\[1\]: priority must be an int of 64 bits"):
        builder.build_all([[3], [4]], SamplingParams(), [0, 2**63])


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
    assert (first.sequences[0].seed, third.sequences[0].seed) == (derived(first), derived(third))
    assert [spec.ordinal for request in (first, second, third) for spec in request.sequences] == [0, 1, 2, 3, 4]
    assert third.request_id == "2"


def test_refused_requests_do_not_count(byte_level: Tokenizer) -> None:
    builder = RequestBuilder(byte_level, LIMITS, lambda request_id, n: request_id == "taken")
    with pytest.raises(RequestError):
        builder.build_all(["a", ""], SamplingParams())
    with pytest.raises(RequestError, match="request_id 'taken' is in use by an unfinished request"):
        builder.build("a", SamplingParams(), request_id="taken")
    request = builder.build("a", SamplingParams())
    assert (request.request_id, request.sequences[0].seed) == ("0", derived(request))


def test_a_number_that_a_user_gave_as_a_name_is_left_alone(byte_level: Tokenizer) -> None:
    builder = RequestBuilder(byte_level, LIMITS, lambda request_id, n: request_id == "1")
    assert [builder.build("a", SamplingParams()).request_id for _ in range(3)] == ["0", "1+", "2"]


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

    for blank in ("\n", " ", "\t\t"):
        spec = builder.build([3], SamplingParams(bad_words=[blank])).sequences[0].params
        assert ids(blank) in spec.bad_words_token_ids
        assert all(blank in byte_level.decode(form) for form in spec.bad_words_token_ids)
    # " fox" is one token and "fox" are two; "x" after a space is a space token and "x".
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
    assert builder.build([3], SamplingParams(top_k=10**15)).sequences[0].params.top_k == 0


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


def test_the_values_at_the_time_of_the_call_are_used(builder: RequestBuilder) -> None:
    params = SamplingParams(max_tokens=4)
    before = builder.build([3], params)
    params.max_tokens = 5
    after = builder.build([3], params)
    assert [request.sequences[0].params.max_tokens for request in (before, after)] == [4, 5]
    assert before.params.max_tokens == 4
    params.top_p = -1.0
    with pytest.raises(RequestError, match=r"^prompts\[0\]: top_p must be in \[0, 1\], got -1.0"):
        builder.build_all([[3]], params)


def test_negative_seeds(builder: RequestBuilder) -> None:
    request = builder.build([3], SamplingParams(seed=-3, n=5))
    assert [spec.seed for spec in request.sequences] == [2**64 - 3, 2**64 - 2, 2**64 - 1, 0, 1]
    # -1 would ask for no seed, so that child is told of its other name
    assert request.seeds == [-3, -2, 2**64 - 1, 0, 1]
    for seed, spec in zip(request.seeds, request.sequences, strict=True):
        assert builder.build([3], SamplingParams(seed=seed)).sequences[0].seed == spec.seed


def test_nothing_of_the_probability_leaves_the_best_token(builder: RequestBuilder) -> None:
    spec = builder.build([3], SamplingParams(top_p=0, top_k=50)).sequences[0].params
    assert (spec.top_k, spec.top_p) == (1, 1.0)


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_listed_ids_are_reported_with_the_sampled_token(builder: RequestBuilder, logprobs: int | None) -> None:
    """Instead of the best."""
    spec = builder.build([3], SamplingParams(logprobs=logprobs, logprob_token_ids=[7, 5, 7])).sequences[0].params
    assert (spec.logprobs, spec.logprob_token_ids) == (0, [7, 5])
    assert "Token id 360 is out of vocabulary: logprob_token_ids" in str(refusal(builder, [3], logprob_token_ids=[360]))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"truncate_prompt_tokens": 5}, slice(-5, None)),
        ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, slice(-5, None)),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, slice(5)),
        # room for 16 tokens is left, or for what else is asked for
        ({"truncate_prompt_tokens": -1}, slice(-16, None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 2}, slice(-30, None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": None}, slice(-31, None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 500}, slice(-1, None)),
    ],
)
def test_prompts_are_cut(builder: RequestBuilder, params: dict[str, Any], kept: slice) -> None:
    prompt = list(range(2, 42))
    request = builder.build(prompt, SamplingParams(**params))
    assert request.prompt_token_ids == request.sequences[0].prompt_token_ids == prompt[kept]
    assert builder.build([3, 4], SamplingParams(**params)).prompt_token_ids == [3, 4][kept]


def test_a_cut_beyond_the_context_is_refused(builder: RequestBuilder) -> None:
    assert str(refusal(builder, [3], truncate_prompt_tokens=33)) == (
        "truncate_prompt_tokens value (33) is greater than max_model_len (32). "
        "Please request a smaller truncation size."
    )


def test_what_the_tokenizer_adds_survives_a_cut() -> None:
    assert cut([1, 5, 6, 7, 2], [5, 6, 7], 4, None) == [1, 6, 7, 2]
    assert cut([1, 5, 6, 7, 2], [5, 6, 7], 4, "right") == [1, 5, 6, 2]
    assert cut([1, 5, 6, 7], [5, 6, 7], 1, None) == [1]
    assert cut([1, 5, 6, 7, 2], [5, 6, 7], 1, None) == [2]


def test_more_log_probabilities_than_tokens_are_all(byte_level: Tokenizer) -> None:
    builder = RequestBuilder(byte_level, dataclasses.replace(LIMITS, max_logprobs=-1))
    spec = builder.build([3], SamplingParams(logprobs=10**30, prompt_logprobs=10**30)).sequences[0].params
    assert (spec.logprobs, spec.prompt_logprobs) == (360, 360)


def test_a_bad_word_without_utf8(builder: RequestBuilder) -> None:
    assert str(refusal(builder, [3], bad_words=["a\ud800"])) == (
        "bad_words has no UTF-8 form: surrogates not allowed at character 1."
    )


def test_errors_do_not_repeat_long_values(builder: RequestBuilder) -> None:
    for prompt in (
        [1.5] * 10**5,
        [10**5000],
        {"prompt": [1] * 10**5},
        {"x" * 10**5: 1},
        {"prompt": 1, "cache_salt": 2},
    ):
        assert len(str(refusal(builder, prompt))) < 1000
    with pytest.raises(RequestError) as caught:
        builder.build_all(["a"], ["x" * 10**6])  # type: ignore[list-item]
    assert len(str(caught.value)) < 1000
