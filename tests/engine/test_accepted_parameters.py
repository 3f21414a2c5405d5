"""Whatever parameters are accepted: finite logits give a token, and an error never blames the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sempre.engine.frontend.limits import RequestLimits
from sempre.engine.frontend.sampling_spec import SpecBuilder
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError
from sempre.workers.sampling import RowResult, Sampler, SamplingState

VOCAB = 70
LIMITS = RequestLimits(
    engine_seed=0, vocab_size=VOCAB, max_model_len=64, max_kv_tokens=64, max_logprobs=20, eos_token_ids=[1]
)
SEQUENCE = [5, 6, 7, 5, 5, 8]
NUM_PROMPT_TOKENS = 3
LARGEST = float(np.finfo(np.float32).max)
# where float32 ends, on both sides of it
MAGNITUDES = [
    0.0,
    1e-300,
    1e-50,
    1e-45,
    1e-38,
    1.2e-38,
    1e-30,
    1e-3,
    0.5,
    1.0,
    1.5,
    2.0,
    1e3,
    1e30,
    3.4e38,
    3.5e38,
    1e50,
]
NUMBERS = st.sampled_from([*MAGNITUDES, *(-value for value in MAGNITUDES)]) | st.floats(allow_nan=True)
SHARES = st.sampled_from([0.0, 1e-300, 1e-45, 1e-38, 0.5, 1.0 - 2**-53, 1.0]) | st.floats(0.0, 1.0)
IDS = st.integers(0, VOCAB - 1)
LOGITS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 80.0, -1e4, 3e36, -3e36, LARGEST, -LARGEST, 1e-45, -1e-38])

PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": NUMBERS,
        "frequency_penalty": NUMBERS,
        "repetition_penalty": NUMBERS,
        "temperature": NUMBERS,
        "top_p": SHARES,
        "top_k": st.integers(-1, VOCAB + 5) | st.sampled_from([2**31, 2**63, 10**30]),
        "min_p": SHARES,
        "seed": st.integers(-(2**63), 2**64 - 1),
        "logprobs": st.integers(0, 20),
        "logit_bias": st.dictionaries(IDS, NUMBERS, max_size=5),
        "allowed_token_ids": st.lists(IDS, min_size=1, max_size=5),
        "logprob_token_ids": st.lists(IDS, max_size=3),
        "min_tokens": st.integers(0, 16),
        "stop_token_ids": st.lists(IDS, max_size=3),
    },
)


@pytest.fixture(scope="module")
def specs(byte_level: Tokenizer) -> SpecBuilder:
    return SpecBuilder(byte_level, LIMITS)


@pytest.fixture(autouse=True)
def numpy_raises() -> Iterator[None]:
    """Whatever the user's process says of floating-point errors."""
    with np.errstate(all="raise"):
        yield


def accepted(parameters: dict[str, Any]) -> SamplingParams | None:
    try:
        return SamplingParams(**parameters)
    except ConfigError:
        return None


def sample(spec: Any, logits: list[float]) -> RowResult:
    state = SamplingState(spec, 7, list(SEQUENCE), NUM_PROMPT_TOKENS)
    return Sampler().sample(torch.tensor([logits], dtype=torch.float32), [state], [len(SEQUENCE)])[0]


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parameters=PARAMETERS, values=st.lists(LOGITS, min_size=1, max_size=VOCAB), rest=LOGITS)
def test_no_accepted_parameters_blame_the_model(
    specs: SpecBuilder, parameters: dict[str, Any], values: list[float], rest: float
) -> None:
    params = accepted(parameters)
    if params is None:
        return
    spec = specs.build(params)
    result = sample(spec, values + [rest] * (VOCAB - len(values)))
    if result.error is not None:
        # the one thing that may be wrong: all that is allowed would end the output too early
        assert "no token is allowed" in result.error.message
        ends = {*spec.eos_token_ids, *spec.stop_token_ids}
        assert set(spec.allowed_token_ids or range(VOCAB)) <= ends
        return
    assert result.token_id is not None
    if spec.allowed_token_ids is not None:
        assert result.token_id in spec.allowed_token_ids
    if result.logprobs is not None:
        assert not np.isnan(np.frombuffer(result.logprobs.logprobs, "<f4")).any()


def test_a_model_that_is_at_fault_is_still_named(specs: SpecBuilder) -> None:
    for value in (np.nan, np.inf):
        for parameters in ({}, {"temperature": 0.02}, {"top_p": 0.5}, {"repetition_penalty": 1e-30}):
            result = sample(specs.build(SamplingParams(**parameters)), [0.0] * 5 + [value] + [1.0] * (VOCAB - 6))
            assert result.error is not None, (value, parameters)
            assert "found NaN or +inf" in result.error.message


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 1e38])
@pytest.mark.parametrize("repetition_penalty", [1.2e-38, 1.0, 3e38])
def test_what_leaves_float32_keeps_its_order(specs: SpecBuilder, temperature: float, repetition_penalty: float) -> None:
    """Token 5 is penalised (of the sequence), 9 is not: what is divided by almost nothing is the best, not an error."""
    logits = [-LARGEST] * VOCAB
    logits[9], logits[5] = 3e38, 2e38
    truncation = {"top_k": 2} if temperature else {}
    params = SamplingParams(temperature=temperature, repetition_penalty=repetition_penalty, **truncation)
    token_id = sample(specs.build(params), logits).token_id
    assert token_id in (5, 9)
    if temperature == 0.0:
        assert token_id == (5 if repetition_penalty < 1 else 9)
