"""A row's result is a function of its logits, state and position: alone, in any batch, with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import sampling_reference as reference
import torch

from sempre.ipc.config import LogprobsMode
from sempre.ipc.messages import LogprobRows, SamplingSpec
from sempre.kernels.threads import get_num_threads, set_num_threads
from sempre.workers.sampling import RowError, RowResult, Sampler, SamplingState, reports_of

VOCAB = 10_001
PROMPT = [5, 6, 7, 8, 9]
OUTPUT = [20, 21, 20, 22]
POSITION = len(PROMPT) + len(OUTPUT)

MODES: tuple[LogprobsMode, ...] = get_args(LogprobsMode)
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.01, "temperature": 1.4},
    {"repetition_penalty": 1.2},
    {"repetition_penalty": 1.2, "temperature": 0.0, "logprobs": 3},
    {"frequency_penalty": 0.5, "presence_penalty": -0.3, "top_p": 0.7},
    {"logprobs": 0},
    {"logprobs": 5, "top_k": 3},
    {"logprobs": -1, "temperature": 0.0},
    {"logit_bias": {3: 4.0, 9: -100.0}, "logprobs": 2},
    {"allowed_token_ids": [5, 500, 5000], "top_p": 0.9},
    {"bad_words_token_ids": [[17], [20, 22, 30]], "min_tokens": 10, "eos_token_ids": [2], "stop_token_ids": [4]},
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = get_num_threads()
    set_num_threads(request.param)
    yield request.param
    set_num_threads(before)


def _state(row: int, **changes: Any) -> SamplingState:
    params = SamplingSpec(max_tokens=100, **changes)
    return SamplingState(params, (row << 33) + row, [*PROMPT, *OUTPUT], len(PROMPT))


def _logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def _values(rows: LogprobRows) -> tuple[list[int], list[float], int]:
    return (
        np.frombuffer(rows.token_ids, "<i4").tolist(),
        np.frombuffer(rows.logprobs, "<f4").tolist(),
        int(np.frombuffer(rows.ranks, "<i4")[0]),
    )


def _one(logits: torch.Tensor, position: int = POSITION, **changes: Any) -> RowResult:
    (result,) = Sampler().sample(logits.clone(), [_state(0, **changes)], [position])
    return result


def test_each_row_alone_equals_the_row_in_a_mixed_batch(threads: int) -> None:
    logits = _logits(32)
    states = [_state(row, **KINDS[row % len(KINDS)]) for row in range(32)]
    sampler = Sampler()
    batch = sampler.sample(logits.clone(), states, [POSITION] * 32)
    assert sampler.sample(logits.clone(), states, [POSITION] * 32) == batch
    reverse = sampler.sample(logits.flip(0).contiguous(), states[::-1], [POSITION] * 32)
    assert reverse[::-1] == batch
    for row in range(32):
        lone = Sampler().sample(logits[row : row + 1].clone(), [states[row]], [POSITION])
        assert lone == [batch[row]]
        assert batch[row].error is None


def test_control_other_seed_or_position_gives_other_tokens() -> None:
    logits = torch.zeros(1, VOCAB).repeat(8, 1)
    states = [_state(row) for row in range(8)]
    tokens = [result.token_id for result in Sampler().sample(logits.clone(), states, [POSITION] * 8)]
    shifted = [result.token_id for result in Sampler().sample(logits.clone(), states, [POSITION - 1] * 8)]
    assert len(set(tokens)) == 8
    assert tokens != shifted


def test_threads_agree() -> None:
    before = get_num_threads()
    results = []
    for count in (1, 2):
        set_num_threads(count)
        states = [_state(row, **kind) for row, kind in enumerate(KINDS)]
        results.append(Sampler().sample(_logits(len(KINDS)), states, [POSITION] * len(KINDS)))
    set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_asking_for_logprobs_changes_no_token(kind: dict[str, Any]) -> None:
    logits = _logits(1)
    without = _one(logits, **(kind | {"logprobs": None}))
    with_logprobs = _one(logits, **(kind | {"logprobs": 4}))
    assert without.token_id == with_logprobs.token_id
    assert without.logprobs is None
    assert with_logprobs.logprobs is not None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logprobs_are_those_of_the_raw_logits_and_equal_prompt_logprobs(kind: dict[str, Any]) -> None:
    logits = _logits(1)
    result = _one(logits, **(kind | {"logprobs": 4}))
    assert result.token_id is not None
    assert result.logprobs is not None
    ids, values, rank = _values(result.logprobs)
    exact = reference.log_softmax(logits[0].numpy())
    order = np.argsort(-exact, kind="stable")
    assert ids == [result.token_id, *order[:4].tolist()]
    assert rank == 1 + np.flatnonzero(order == result.token_id)[0]
    assert np.abs(np.array(values) - exact[ids]).max() < 5e-6
    assert Sampler().prompt_logprobs(logits, [result.token_id], 4) == result.logprobs


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_token_is_the_best_of_the_processed_logits_with_its_noise(kind: dict[str, Any]) -> None:
    """Exactly: so they are what the token was drawn from, and not something near."""
    raw, state = _logits(1), _state(0, **(kind | {"logprobs": -1}))
    (result,) = Sampler(reports_of("processed_logits")).sample(raw.clone(), [state], [POSITION])
    assert result.token_id is not None
    assert result.logprobs is not None
    ids, values, rank = _values(result.logprobs)
    assert ids[0] == result.token_id
    assert values[0] == values[rank]
    assert values[1:] == sorted(values[1:], reverse=True)
    processed = np.empty(VOCAB, np.float32)
    processed[ids[1:]] = values[1:]
    temperature = state.params.temperature
    noise = reference.gumbel_noise(state.seed, POSITION, VOCAB) if temperature else np.float32(0)
    assert int((processed + noise).argmax()) == result.token_id
    p = state.params
    plain = raw.numpy()[0] / np.float32(temperature or 1)
    if not state.rewrites_logits:
        keep = reference.truncated(plain, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)
        assert np.array_equal(processed, np.where(keep, plain, np.float32(-np.inf)))
    else:  # control: something was processed
        assert not np.array_equal(processed, plain)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_processed_logprobs_are_those_of_the_processed_logits(kind: dict[str, Any]) -> None:
    found = {}
    for mode in MODES:
        (result,) = Sampler(reports_of(mode)).sample(_logits(1), [_state(0, **(kind | {"logprobs": -1}))], [POSITION])
        assert result.logprobs is not None
        found[mode] = (result.token_id, *_values(result.logprobs))
    assert len({token for token, *_ in found.values()}) == 1
    for space in ("raw", "processed"):
        _, ids, logits, rank = found[f"{space}_logits"]
        _, same_ids, logprobs, same_rank = found[f"{space}_logprobs"]
        assert (ids, rank) == (same_ids, same_rank)
        exact = reference.log_softmax(np.array(logits[1:], np.float32))
        finite = np.isfinite(exact)
        assert np.array_equal(finite, np.isfinite(logprobs[1:]))
        assert np.abs(np.array(logprobs[1:])[finite] - exact[finite]).max() < 5e-6
    assert found["raw_logits"][2] == [float(_logits(1)[0, token]) for token in found["raw_logits"][1]]


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_reports_of_each_row_alone_equal_those_in_a_mixed_batch(threads: int, mode: LogprobsMode) -> None:
    logits = _logits(32)
    states = [_state(row, **({"logprobs": 3} | KINDS[row % len(KINDS)])) for row in range(32)]
    batch = Sampler(reports_of(mode)).sample(logits.clone(), states, [POSITION] * 32)
    for row in range(32):
        lone = Sampler(reports_of(mode)).sample(logits[row : row + 1].clone(), [states[row]], [POSITION])
        assert lone == [batch[row]]
    raw = Sampler().sample(logits.clone(), states, [POSITION] * 32)
    assert [result.token_id for result in raw] == [result.token_id for result in batch]
    assert raw != batch


def test_greedy_follows_the_masks() -> None:
    logits = torch.arange(VOCAB, dtype=torch.float32)[None]
    top = VOCAB - 1
    assert _one(logits, temperature=0.0).token_id == top
    assert _one(logits, temperature=0.0, allowed_token_ids=[3, 9]).token_id == 9
    assert _one(logits, temperature=0.0, bad_words_token_ids=[[top], [1, top - 1]]).token_id == top - 1
    assert _one(logits, temperature=0.0, logit_bias={4: 1e6}).token_id == 4


def test_bad_phrases_match_within_the_output_only() -> None:
    logits = torch.arange(VOCAB, dtype=torch.float32)[None]
    top = VOCAB - 1
    banned_phrases = [OUTPUT, [20, 22], [21, 20, 22]]
    for phrase in [*banned_phrases, [20, 21], [9, *OUTPUT]]:
        expected = top - 1 if phrase in banned_phrases else top
        assert _one(logits, temperature=0.0, bad_words_token_ids=[[*phrase, top]]).token_id == expected


def test_min_tokens_masks_end_and_stop_ids_until_reached() -> None:
    logits = torch.arange(VOCAB, dtype=torch.float32)[None]
    top = VOCAB - 1
    ends = {"temperature": 0.0, "eos_token_ids": [top], "stop_token_ids": [top - 1, VOCAB + 7]}
    assert _one(logits, min_tokens=len(OUTPUT) + 1, **ends).token_id == top - 2
    assert _one(logits, min_tokens=len(OUTPUT), **ends).token_id == top
    assert _one(logits, len(PROMPT), min_tokens=1, **ends).token_id == top - 2


def test_bias_comes_after_the_masks_and_before_the_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    # repetition halves the bias of a token of the prompt: 8 / 2 < 5
    result = _one(logits, temperature=0.0, logit_bias={PROMPT[0]: 8.0, 100: 5.0}, repetition_penalty=2.0)
    assert result.token_id == 100
    assert _one(logits, temperature=0.0, logit_bias={50: 99.0}, allowed_token_ids=[60]).token_id == 60


def test_errors_stay_in_their_row() -> None:
    logits = _logits(8)
    expected = Sampler().sample(logits[7:].clone(), [_state(7)], [POSITION])[0]
    logits[0, 5] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    logits[3, 5] = torch.nan
    states = [
        _state(0),
        _state(1, top_p=0.5),
        _state(2, temperature=0.0, logprobs=3),
        _state(3, allowed_token_ids=[9]),
        _state(4, allowed_token_ids=[9], bad_words_token_ids=[[9]]),
        _state(5, logit_bias={VOCAB: 1.0}),
        _state(6, temperature=0.0, allowed_token_ids=[1, VOCAB + 3]),
        _state(7),
    ]
    results = Sampler().sample(logits, states, [POSITION] * 8)
    assert results[7] == expected
    operations = [result.error.facts["operation"] for result in results[:7] if result.error is not None]
    assert operations == ["logits", "logits", "sampling", "logits", "sampling", "logit_bias", "allowed_token_ids"]
    assert all(result.token_id is None and result.logprobs is None for result in results[:7])
    assert results[5].error is not None
    assert (
        results[5].error.message == f"logit_bias: expected token ids below the vocabulary size {VOCAB}, found {VOCAB}"
    )


def test_prompt_logprobs_name_a_bad_row() -> None:
    logits = _logits(3)
    logits[1, 0] = torch.nan
    with pytest.raises(RowError, match="prompt_logprobs: the logits of row 1 contain NaN"):
        Sampler().prompt_logprobs(logits, [0, 0, 0], 1)


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="expected as many states and positions as the 2 rows"):
        Sampler().sample(_logits(2), [_state(0)], [POSITION])
