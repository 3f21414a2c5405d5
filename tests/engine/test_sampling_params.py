"""Defaults, ranges, normalisation and error texts of sampling parameters."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest

from sempre.engine.sampling_params import NEUTRAL_VALUES, RequestOutputKind, SamplingParams
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.errors import ConfigError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n must be at least 1, got 0."),
    ({"n": 16385}, "n must be at most 16384, got 16385."),
    ({"n": 1.5}, "n must be an int, but is of type <class 'float'>."),
    ({"n": True}, "n must be an int, but is of type <class 'bool'>."),
    ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2."),
    ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1."),
    ({"presence_penalty": math.nan}, "presence_penalty must be in [-2, 2], got nan."),
    ({"frequency_penalty": -3}, "frequency_penalty must be in [-2, 2], got -3.0."),
    ({"frequency_penalty": "1"}, "frequency_penalty must be a number, got '1'."),
    ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number, got inf."),
    ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero, got 0.0."),
    ({"temperature": math.nan}, "temperature must be a finite number, got nan."),
    ({"temperature": -0.5}, "temperature must be non-negative, got -0.5."),
    ({"temperature": 1e39}, "temperature must be at most 3.40282e+38, float32's largest, got 1e+39."),
    ({"repetition_penalty": 1e-50}, "repetition_penalty must be at least 1.17549e-38, float32's smallest, got 1e-50."),
    ({"repetition_penalty": 1e50}, "repetition_penalty must be at most 3.40282e+38, float32's largest, got 1e+50."),
    ({"temperature": None}, "temperature must be a number, got None."),
    ({"top_p": -0.1}, "top_p must be in [0, 1], got -0.1."),
    ({"top_p": 1.01}, "top_p must be in [0, 1], got 1.01."),
    ({"top_p": math.nan}, "top_p must be in [0, 1], got nan."),
    ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
    ({"top_k": 1.5}, "top_k must be an int, got 1.5."),
    ({"top_k": math.inf}, "top_k must be an int, got inf."),
    ({"n": 2.0}, "n must be an int, but is of type <class 'float'>."),
    ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
    ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
    ({"max_tokens": "3"}, "max_tokens must be an int, got '3'."),
    ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
    ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
    ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2."),
    ({"prompt_logprobs": -2}, "prompt_logprobs must be non-negative or -1, got -2."),
    ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
    ({"stop": ""}, "stop cannot contain an empty string."),
    ({"stop": [1]}, "stop must contain only strings, got [1]."),
    (
        {"stop": "x", "detokenize": False},
        "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
    ),
    ({"stop_token_ids": [1, "2"]}, "stop_token_ids must contain only integers, got [1, '2']."),
    ({"stop_token_ids": 5}, "stop_token_ids must contain only integers, got 5."),
    ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty!"),
    ({"allowed_token_ids": [1.5]}, "allowed_token_ids must contain only integers, got [1.5]."),
    ({"bad_words": [""]}, "bad_words cannot contain an empty string. Remove it."),
    ({"bad_words": "word"}, "bad_words must contain only strings, got 'word'."),
    ({"bad_words": [str(i) for i in range(129)]}, "bad_words can hold at most 128 words."),
    ({"logit_bias": [1]}, "logit_bias must be a dict of token id to number, got [1]."),
    ({"logit_bias": {"x": 1.0}}, "logit_bias keys must be token ids, got 'x'."),
    ({"logit_bias": {5: 1.0, "5": 2.0}}, "logit_bias names token id 5 twice."),
    ({"logit_bias": {5: math.nan}}, "logit_bias of token id 5 must be a number, got nan."),
    ({"seed": -(2**63) - 1}, "seed must be None or in [-2**63, 2**64), got -9223372036854775809."),
    ({"seed": 2**64}, "seed must be None or in [-2**63, 2**64), got 18446744073709551616."),
    ({"seed": 1.5}, "seed must be an int, got 1.5."),
    ({"logprob_token_ids": [1.5]}, "logprob_token_ids must contain only integers, got [1.5]."),
    (
        {"logprob_token_ids": list(range(129))},
        "logprob_token_ids can hold at most 128 ids, got 129.",
    ),
    (
        {"prompt_logprob_token_ids": [1, 2]},
        "prompt_logprob_token_ids must be a list of lists of token ids, and not empty, got [1, 2].",
    ),
    (
        {"prompt_logprob_token_ids": [[], []]},
        "prompt_logprob_token_ids must be a list of lists of token ids, and not empty, got [[], []].",
    ),
    (
        {"prompt_logprob_token_ids": np.zeros(3, np.int32)},
        "prompt_logprob_token_ids must be a list of lists of token ids, and not empty, got [0, 0, 0].",
    ),
    ({"prompt_logprob_token_ids": [[1], [True]]}, "prompt_logprob_token_ids must contain only integers, got [True]."),
    (
        {"prompt_logprob_token_ids": [[1], [-2]]},
        "prompt_logprob_token_ids must contain token ids, or -1 for none, got -2.",
    ),
    ({"prompt_logprob_start": 3}, "prompt_logprob_start requires prompt_logprob_token_ids."),
    (
        {"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": -1},
        "prompt_logprob_start must be non-negative, got -1.",
    ),
    ({"thinking_token_budget": -2}, "thinking_token_budget must be non-negative, or -1, got -2."),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be at least 1, or -1, got 0."),
    ({"truncation_side": "middle"}, "truncation_side must be 'left' or 'right', got 'middle'."),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1."),
    ({"detokenize": None}, "detokenize must be True or False, got None."),
    ({"output_kind": 7}, "output_kind must be a RequestOutputKind, got 7."),
    ({"stream_interval": 0}, "stream_interval must be at least 1, got 0."),
    ({"stream_interval": 1.5}, "stream_interval must be an int, got 1.5."),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=[str(keywords) for keywords, _ in REFUSED])
def test_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**keywords)
    assert str(caught.value) == message
    assert caught.value.parameter == message.split()[0]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "keywords",
    [
        {"n": 10**5000},
        {"n": -(10**5000)},
        {"seed": 10**5000},
        {"top_k": -(10**5000)},
        {"min_tokens": 10**5000},
        {"logit_bias": {"9" * 5000: 1.0}},
        {"logit_bias": {10**5000: math.nan}},
        {"stop": [1] * 10**6},
        {"stop_token_ids": "x" * 10**6},
        {"temperature": [[["x" * 1000] * 1000] * 1000]},
        {"output_kind": "x" * 10**6},
        {"truncation_side": "x" * 10**6},
        {"allowed_token_ids": {"x": ["y"] * 10**5}},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_errors_are_short_whatever_was_given(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**keywords)
    assert len(str(caught.value)) < 1000


def test_error_carries_the_value() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(top_p=3.0)
    assert (caught.value.parameter, caught.value.value) == ("top_p", 3.0)


def test_defaults() -> None:
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "prompt_logprob_token_ids": None,
        "prompt_logprob_start": None,
        "logprob_token_ids": None,
        "flat_logprobs": False,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "stream_interval": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "structured_outputs": None,
        "thinking_token_budget": None,
        "truncate_prompt_tokens": None,
        "truncation_side": None,
    }


def test_unknown_keyword_names_the_near_one() -> None:
    with pytest.raises(TypeError, match=r"SamplingParams has no parameter 'temprature'. Did you mean 'temperature'\?"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_unknown_keyword_without_a_near_one() -> None:
    with pytest.raises(TypeError) as caught:
        SamplingParams(xyzzy=1)  # type: ignore[call-arg]
    assert str(caught.value) == "SamplingParams has no parameter 'xyzzy'."


def test_a_renamed_parameter_is_told_its_new_name() -> None:
    with pytest.raises(ConfigError, match="Use structured_outputs="):
        SamplingParams(guided_decoding={"json": {}})


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_parameters_this_engine_lacks_pass_where_they_ask_for_nothing(name: str) -> None:
    for value in (None, *NEUTRAL_VALUES[name]):
        assert SamplingParams(**{name: value}) == SamplingParams()
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: "something"})
    assert str(caught.value).startswith(f"{name} is not supported by this engine. ")
    assert caught.value.parameter == name


def test_every_parameter_without_effect_is_checked_under_its_own_name() -> None:
    declared = [name for name, hint in SamplingParams.__annotations__.items() if hint.startswith("InitVar")]
    assert declared == list(NEUTRAL_VALUES)


def test_positional_arguments_are_in_the_order_of_vllm() -> None:
    params = SamplingParams(2, 0.1, 0.2, 1.3, 0.4, None, 0.5, 6, 0.7, 8, "9", [10], True, 11, 1)
    expected = {
        "n": 2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.3,
        "temperature": 0.4,
        "top_p": 0.5,
        "top_k": 6,
        "min_p": 0.7,
        "seed": 8,
        "stop": ["9"],
        "stop_token_ids": [10],
        "ignore_eos": True,
        "max_tokens": 11,
        "min_tokens": 1,
    }
    assert {name: getattr(params, name) for name in expected} == expected


def test_numbers_as_vllm_takes_them() -> None:
    params = SamplingParams(top_k=40.0, max_tokens=16.0, seed=-5.0, temperature=37.5, top_p=0, stop=list("abcdefg"))
    assert (params.top_k, params.max_tokens, params.seed, params.temperature) == (40, 16, -5, 37.5)
    assert [type(value) for value in (params.top_k, params.max_tokens, params.seed)] == [int, int, int]
    assert (params.top_p, params.stop) == (0.0, list("abcdefg"))
    assert SamplingParams(seed=-(2**63)).seed == -(2**63)


def test_none_from_optional_is_the_default_but_for_max_tokens() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)] + list(NEUTRAL_VALUES)
    params = SamplingParams.from_optional(**dict.fromkeys(names))
    assert params == SamplingParams(max_tokens=None)
    assert SamplingParams.from_optional(temperature=0.5, n=None) == SamplingParams(temperature=0.5)
    with pytest.raises(TypeError, match="Did you mean 'temperature'"):
        SamplingParams.from_optional(temprature=1.0)


def test_greedy_resets_truncation() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=7, min_p=0.2)
    assert (params.top_p, params.top_k, params.min_p, params.is_greedy) == (1.0, 0, 0.0, True)


def test_small_temperature_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sempre.engine.sampling_params"):
        params = SamplingParams(temperature=0.001)
    assert params.temperature == 0.01
    assert caplog.messages == ["temperature 0.001 is too small for float32 and is raised to 0.01."]
    assert not params.is_greedy


def test_normalisation() -> None:
    params = SamplingParams(
        top_k=-1, seed=-1, stop="END", logit_bias={"5": 250, 6: -250.0, 7: 1}, stop_token_ids=(3, np.int64(4))
    )
    assert (params.top_k, params.seed, params.stop, params.stop_token_ids) == (0, None, ["END"], [3, 4])
    assert params.logit_bias == {5: 100.0, 6: -100.0, 7: 1.0}
    assert params.stop_strings == ["END"]


def test_numpy_scalars_become_python_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int32(3), seed=np.uint64(2**64 - 1))
    assert [type(value) for value in (params.temperature, params.max_tokens, params.seed)] == [float, int, int]
    assert params.seed == 2**64 - 1


EVERYTHING: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "stop": ["a"],
    "stop_token_ids": [4],
    "logit_bias": {5: 1.0},
    "allowed_token_ids": [1, 2],
    "bad_words": ["x"],
    "logprob_token_ids": [3],
    "prompt_logprob_token_ids": [[3, 4], [5, -1]],
    "prompt_logprob_start": 7,
    "structured_outputs": StructuredOutputsParams(regex="a"),
}


@pytest.mark.parametrize(
    "copied",
    [
        SamplingParams.clone,
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        lambda params: pickle.loads(pickle.dumps(params)),
    ],
    ids=["clone", "copy", "deepcopy", "replace", "pickle"],
)
def test_copies_are_equal(copied: Any) -> None:
    params = SamplingParams(**EVERYTHING)
    twin = copied(params)
    assert twin == params
    assert twin is not params
    assert repr(twin) == repr(params)
    twin.temperature = 0.7
    assert (twin == params, params.temperature) == (False, 0.5)


def test_a_clone_shares_no_list() -> None:
    params = SamplingParams(**EVERYTHING)
    twin = params.clone()
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids"):
        getattr(twin, name).append(getattr(twin, name)[0])
    assert twin.prompt_logprob_token_ids is not None
    twin.prompt_logprob_token_ids[0].append(6)
    assert isinstance(twin.logit_bias, dict)
    twin.logit_bias[6] = 2.0  # type: ignore[index]
    assert params == SamplingParams(**EVERYTHING)


def test_assigned_values_are_checked_by_the_next_request() -> None:
    params = SamplingParams()
    params.stop, params.top_k, params.temperature = "END", -1, 0
    assert params.stop_strings == ["END"]
    clone = params.clone()
    assert (clone.stop, clone.top_k, clone.is_greedy) == (["END"], 0, True)
    params.top_p = 2
    with pytest.raises(ConfigError, match=r"top_p must be in \[0, 1\], got 2.0"):
        params.clone()
    with pytest.raises(AttributeError, match="temprature"):
        params.temprature = 1.0  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="best_of"):
        params.best_of = 2


def test_parameters_have_a_json_form() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(SamplingParams(seed=3))))["seed"] == 3


def test_replaceable() -> None:
    params = SamplingParams(max_tokens=4, stop=["a"])
    changed = dataclasses.replace(params, max_tokens=8)
    assert (changed.max_tokens, changed.stop, params.max_tokens) == (8, ["a"], 4)
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        dataclasses.replace(params, max_tokens=0)


def test_unlimited_tokens_allow_any_minimum() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=500).min_tokens == 500


def test_true_asks_for_one_log_probability() -> None:
    assert SamplingParams(logprobs=True, prompt_logprobs=True) == SamplingParams(logprobs=1, prompt_logprobs=1)


def test_minus_one_is_no_thinking_budget() -> None:
    assert SamplingParams(thinking_token_budget=-1) == SamplingParams()
    assert SamplingParams(thinking_token_budget=0).thinking_token_budget == 0


def test_entries_that_repeat_count_once() -> None:
    params = SamplingParams(stop_token_ids=[9, 4, 9], bad_words=["b", "a", "b"] * 100, logprob_token_ids=[7, 5, 7])
    assert (params.stop_token_ids, params.bad_words, params.logprob_token_ids) == ([9, 4], ["b", "a"], [7, 5])


def test_the_callers_lists_stay_theirs() -> None:
    stop_token_ids = [1]
    params = SamplingParams(stop_token_ids=stop_token_ids)
    stop_token_ids.append(2)
    assert params.stop_token_ids == [1]
