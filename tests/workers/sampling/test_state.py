"""A state that went through all steps equals a rebuilt one, at every position and after a step back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import sampling_reference as reference

from sempre.ipc.messages import SamplingSpec
from sempre.workers.sampling import SamplingState
from sempre.workers.sampling.row_error import RowError

VOCAB = 300
PARAMS = SamplingSpec(
    max_tokens=1000,
    repetition_penalty=1.3,
    frequency_penalty=0.2,
    presence_penalty=0.4,
    min_tokens=3,
    eos_token_ids=[2],
)


def _row() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)


def _processed(state: SamplingState, position: int) -> npt.NDArray[np.float32]:
    row = _row()
    state.process(row, position)
    return row


def test_incremental_state_equals_a_resumed_one() -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, 200).tolist()
    num_prompt_tokens = 40
    live = tokens[:num_prompt_tokens]
    state = SamplingState(PARAMS, 1, live, num_prompt_tokens)
    for position in range(num_prompt_tokens, 200):
        resumed = SamplingState(PARAMS, 1, tokens[:position], num_prompt_tokens)
        row = _processed(state, position)
        assert np.array_equal(row.view(np.uint32), _processed(resumed, position).view(np.uint32))
        live.append(tokens[position])
    plain = reference.penalised(_row(), tokens[:40], tokens[40:], repetition=1.3, frequency=0.2, presence=0.4)
    assert np.abs(_processed(state, 200) - plain).max() < 1e-5


def test_one_state_serves_several_positions_of_its_sequence() -> None:
    tokens = np.random.default_rng(2).integers(0, VOCAB, 60).tolist()
    state = SamplingState(PARAMS, 1, tokens, 20)
    for position in (60, 30, 31, 20, 59):
        fresh = SamplingState(PARAMS, 1, tokens[:position], 20)
        assert np.array_equal(_processed(state, position), _processed(fresh, position))


def test_tokens_that_are_replaced_are_not_counted() -> None:
    tokens, others = np.random.default_rng(3).integers(0, VOCAB, (2, 60)).tolist()
    state = SamplingState(PARAMS, 1, tokens, 20)
    before = _processed(state, 60)
    for start in (59, 45, 20):
        state.rewind(start)
        tokens[start:] = others[start:]
        fresh = SamplingState(PARAMS, 1, tokens[:60], 20)
        assert np.array_equal(_processed(state, 60), _processed(fresh, 60))
    assert not np.array_equal(_processed(state, 60), before)


def test_plain_parameters_leave_the_logits_alone() -> None:
    for params in (SamplingSpec(max_tokens=5), SamplingSpec(max_tokens=5, temperature=0.0, top_k=3, min_tokens=2)):
        state = SamplingState(params, 1, [1, 2], 1)
        assert not state.rewrites_logits
        assert np.array_equal(_processed(state, 2), _row())
    assert SamplingState(PARAMS, 1, [1, 2], 1).rewrites_logits


def test_a_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(RowError, match=f"penalties: expected token ids below {VOCAB}, found 900 in the sequence"):
        _processed(SamplingState(PARAMS, 1, [1, 900], 1), 2)
    bad_words = SamplingSpec(max_tokens=5, bad_words_token_ids=[[1, VOCAB]])
    with pytest.raises(RowError, match="bad_words: expected token ids below the vocabulary size 300, found 300"):
        _processed(SamplingState(bad_words, 1, [1], 1), 1)
