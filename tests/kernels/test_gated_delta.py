"""Gated delta layers: values against float64, and bits that do not depend on cuts, slots, or who is beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from delta_cases import SHAPES, DeltaCase, check_cuts, check_verification, relative

from sempre.kernels.gated_delta import DeltaHeads, cpu
from sempre.kernels.jit import compiled
from sempre.kernels.sampling.elementary import sigmoid32, softplus32

LENGTHS = (37, 12, 1)


@pytest.mark.parametrize("heads", SHAPES)
def test_values_are_those_of_float64(heads: DeltaHeads) -> None:
    case = DeltaCase(heads, LENGTHS)
    rows, state = case.whole()
    for s in range(len(LENGTHS)):
        expected, last = case.expected(s)
        assert relative(rows[s], expected) < 2e-6
        assert relative(state.recurrent[s], last) < 1e-6


@pytest.mark.parametrize("heads", SHAPES)
def test_bits_do_not_depend_on_cuts_slots_or_neighbours(heads: DeltaHeads) -> None:
    check_cuts(DeltaCase(heads, LENGTHS))


def test_a_step_may_leave_the_state_after_every_row() -> None:
    check_verification(DeltaCase(SHAPES[0], (37,)))


def test_control_the_state_of_another_row_gives_other_bits() -> None:
    case = DeltaCase(SHAPES[0], LENGTHS)
    whole, _ = case.whole()
    state = case.states(2)
    case.step(state, [(0, 0, 5)], [-1], [[-1, -1, -1, 0, 1]])
    assert torch.equal(case.step(state, [(0, 5, 6)], [1], [[-1]])[0], whole[0][5:6])
    assert not torch.equal(case.step(state, [(0, 5, 6)], [0], [[-1]])[0], whole[0][5:6])
    assert not torch.equal(case.step(state, [(0, 5, 6)], [-1], [[-1]])[0], whole[0][5:6])


@pytest.mark.parametrize("heads", [SHAPES[0], SHAPES[3]])
def test_bits_do_not_depend_on_threads(heads: DeltaHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    case = DeltaCase(heads, LENGTHS)
    found = []
    for elements in (0, 1 << 40):
        monkeypatch.setattr(cpu, "PARALLEL_ELEMENTS", elements)
        rows, state = case.whole()
        found.append([*rows, state.recurrent, state.conv])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_that_is_not_finite_spoils_later_rows_of_its_request_alone() -> None:
    case = DeltaCase(SHAPES[0], LENGTHS)
    whole, _ = case.whole()
    case.rows[0][20, 64 + 3] = float("inf")  # a key
    case.ba[1][7, 0] = float("nan")
    rows, _ = case.whole()
    assert torch.equal(rows[0][:20], whole[0][:20])
    assert rows[0][20:].isnan().any(dim=1).all()
    assert torch.equal(rows[1][:7], whole[1][:7])
    assert rows[1][7:].isnan().any(dim=1).all()
    assert torch.equal(rows[2], whole[2])


@pytest.mark.parametrize(("reads", "writes"), [(2, 0), (-2, 0), (0, 2), (0, -2)])
def test_a_slot_that_does_not_exist_is_refused(reads: int, writes: int) -> None:
    case = DeltaCase(SHAPES[0], LENGTHS)
    with pytest.raises(IndexError, match=r"gated_delta: (reads|writes) has slots from"):
        case.step(case.states(2), [(0, 0, 1)], [reads], [[writes]])


def test_shapes_that_do_not_fit_are_refused() -> None:
    case, narrow = DeltaCase(SHAPES[0], (3,)), DeltaCase(DeltaHeads(2, 2, 32, 32, 4), (3,))
    case.weights = narrow.weights
    with pytest.raises(ValueError, match=r"gated_delta: rows \(3, 384\) does not fit DeltaHeads"):
        case.step(case.states(1), [(0, 0, 3)], [-1], [[-1, -1, -1]])
    with pytest.raises(
        ValueError, match=r"gated_delta: reads, writes and query_starts of \(2, 3, 2\) do not fit 3 rows"
    ):
        narrow.step(narrow.states(1), [(0, 0, 3)], [-1, -1], [[-1, -1, -1]])


@compiled()
def _softplus_and_sigmoid(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[0, i], out[1, i] = softplus32(x[i]), sigmoid32(x[i])


def test_softplus_has_full_relative_precision() -> None:
    x = np.concatenate([np.linspace(-86, 90, 5001), [0.0, -0.0, -1e30, 1e30]]).astype(np.float32)
    out = np.empty((2, len(x)), np.float32)
    _softplus_and_sigmoid(x, out)
    wide = torch.from_numpy(x).double()
    expected = torch.nn.functional.softplus(wide, threshold=1e9), wide.sigmoid()
    for found, exact in zip(torch.from_numpy(out).double(), expected, strict=True):
        assert ((found - exact).abs() <= 2e-7 * exact + 1e-37).all()
    _softplus_and_sigmoid(np.full(1, np.nan, np.float32), out)
    assert np.isnan(out[:, 0]).all()
