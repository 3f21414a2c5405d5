"""Masks, bias and penalties of one row."""

from __future__ import annotations

import numpy as np
import pytest
import sampling_reference as reference

from sempre.kernels.sampling import add_bias, allow_only, apply_penalties, forbid


def _row() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(5).standard_normal(50).astype(np.float32)


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.3, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 0.6, 0.0), (1.0, 0.0, -1.5), (1.2, -0.4, 0.9)],
)
def test_penalties_equal_a_plain_loop(repetition: float, frequency: float, presence: float) -> None:
    prompt, output = [1, 2, 3, 3, 10], [3, 4, 4, 4, 40]
    token_ids = np.unique([*prompt, *output])
    row = _row()
    expected = reference.penalised(row, prompt, output, repetition=repetition, frequency=frequency, presence=presence)
    apply_penalties(
        row,
        token_ids,
        np.isin(token_ids, prompt),
        np.array([output.count(token) for token in token_ids], np.int32),
        repetition=repetition,
        frequency=frequency,
        presence=presence,
    )
    assert np.abs(row - expected).max() < 1e-6
    untouched = np.setdiff1d(np.arange(50), token_ids)
    assert np.array_equal(row[untouched], _row()[untouched])


def test_masks_and_bias() -> None:
    row = _row()
    allow_only(row, np.array([3, 7, 9]))
    forbid(row, np.array([7, 8]))
    add_bias(row, np.array([9, 10]), np.array([2.0, 5.0], np.float32))
    assert np.flatnonzero(row > -np.inf).tolist() == [3, 9]
    assert row[3] == _row()[3]
    assert row[9] == _row()[9] + np.float32(2)
