"""Gated delta layers: values against float64, and bits that do not depend on cuts, slots, or who is beside."""

from __future__ import annotations

import pytest
import torch
from delta_cases import SHAPES, DeltaCase, check_cuts, check_verification, relative

from sempre.kernels.gated_delta import DeltaHeads, cpu

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
