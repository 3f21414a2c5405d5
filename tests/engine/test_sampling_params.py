"""Defaults, ranges, normalisation and error texts of sampling parameters."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import numpy as np
import pytest

from sempre.engine.sampling_params import UNSUPPORTED_PARAMETERS, RequestOutputKind, SamplingParams
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
    ({"temperature": 2.5}, "temperature must be in [0, 2], got 2.5."),
    ({"temperature": None}, "temperature must be a number, got None."),
    ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
    ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01."),
    ({"top_p": math.nan}, "top_p must be in (0, 1], got nan."),
    ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
    ({"top_k": 1.0}, "top_k must be an int, got 1.0."),
    ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
    ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
    ({"max_tokens": "3"}, "max_tokens must be an int, got '3'."),
    ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
    ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
    ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2."),
    ({"logprobs": True}, "logprobs must be an int, got True."),
    ({"prompt_logprobs": -2}, "prompt_logprobs must be non-negative or -1, got -2."),
    ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
    ({"stop": ""}, "stop cannot contain an empty string."),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop can hold at most 4 strings, got 5."),
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
    ({"bad_words": [" "]}, "bad_words cannot contain an empty string. Remove it."),
    ({"bad_words": "word"}, "bad_words must contain only strings, got 'word'."),
    ({"bad_words": ["a"] * 129}, "bad_words can hold at most 128 words."),
    ({"logit_bias": [1]}, "logit_bias must be a dict of token id to number, got [1]."),
    ({"logit_bias": {"x": 1.0}}, "logit_bias keys must be token ids, got 'x'."),
    ({"logit_bias": {5: 1.0, "5": 2.0}}, "logit_bias names token id 5 twice."),
    ({"logit_bias": {5: math.nan}}, "logit_bias of token id 5 must be a number, got nan."),
    ({"seed": -2}, "seed must be None or in [0, 2**64), got -2."),
    ({"seed": 2**64}, "seed must be None or in [0, 2**64), got 18446744073709551616."),
    ({"seed": 1.0}, "seed must be an int, got 1.0."),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1."),
    ({"detokenize": None}, "detokenize must be True or False, got None."),
    ({"output_kind": 7}, "output_kind must be a RequestOutputKind, got 7."),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=[str(keywords) for keywords, _ in REFUSED])
def test_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**keywords)
    assert str(caught.value) == message
    assert caught.value.parameter == message.split()[0]
    assert isinstance(caught.value, ValueError)


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
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "structured_outputs": None,
    }


def test_unknown_keyword_names_the_near_one() -> None:
    with pytest.raises(TypeError, match=r"SamplingParams has no parameter 'temprature'. Did you mean 'temperature'\?"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_unknown_keyword_without_a_near_one() -> None:
    with pytest.raises(TypeError) as caught:
        SamplingParams(xyzzy=1)  # type: ignore[call-arg]
    assert str(caught.value) == "SamplingParams has no parameter 'xyzzy'."


def test_a_renamed_parameter_is_named_anew() -> None:
    with pytest.raises(ConfigError, match="Use structured_outputs="):
        SamplingParams(guided_decoding=None)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_PARAMETERS))
def test_parameters_this_engine_lacks(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: None})
    assert str(caught.value).startswith(f"{name} is not supported by this engine. ")
    assert caught.value.parameter == name


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]


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


def test_frozen_but_replaceable() -> None:
    params = SamplingParams(max_tokens=4, stop=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 5  # type: ignore[misc]
    changed = dataclasses.replace(params, max_tokens=8)
    assert (changed.max_tokens, changed.stop, params.max_tokens) == (8, ["a"], 4)
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        dataclasses.replace(params, max_tokens=0)


def test_unlimited_tokens_allow_any_minimum() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=500).min_tokens == 500


def test_the_callers_lists_stay_theirs() -> None:
    stop_token_ids = [1]
    params = SamplingParams(stop_token_ids=stop_token_ids)
    stop_token_ids.append(2)
    assert params.stop_token_ids == [1]
