"""Gated delta layers on a GPU: values against float64, and bits that do not depend on cuts, slots, or neighbours."""

from __future__ import annotations

import pytest
import torch
from delta_cases import SHAPES, DeltaCase, check_cuts, check_verification, relative

from sempre.kernels.gated_delta import DeltaHeads

pytestmark = pytest.mark.gpu

# rounding of what goes from kernel to kernel
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ALL = [*SHAPES, DeltaHeads(16, 32, 128, 128, 4)]


def case_of(heads: DeltaHeads, lengths: tuple[int, ...], dtype: torch.dtype) -> DeltaCase:
    return DeltaCase(heads, lengths, dtype, torch.device("cuda"))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("heads", ALL)
def test_values_are_those_of_float64(heads: DeltaHeads, dtype: torch.dtype) -> None:
    case = case_of(heads, (70, 12, 1), dtype)
    rows, state = case.whole()
    for s in range(3):
        expected, last = case.expected(s)
        assert relative(rows[s], expected) < ROUNDING[dtype]
        assert relative(state.recurrent[s], last) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", ALL)
def test_bits_do_not_depend_on_cuts_slots_or_neighbours(heads: DeltaHeads, dtype: torch.dtype) -> None:
    check_cuts(case_of(heads, (70, 12, 1), dtype))


@pytest.mark.parametrize("heads", [SHAPES[0], ALL[-1]])
def test_a_step_may_leave_the_state_after_every_row(heads: DeltaHeads) -> None:
    check_verification(case_of(heads, (37,), torch.bfloat16))


@pytest.mark.parametrize("count", [1, 2, 31, 200])
def test_a_request_has_its_bits_among_any_number(count: int) -> None:
    case = case_of(ALL[-1], (9,) * count, torch.bfloat16)
    rows, state = case.whole()
    alone = case.states(1)
    own = case.step(alone, [(count - 1, 0, 9)], [-1], [[-1] * 8 + [0]])[0]
    assert torch.equal(own, rows[-1])
    assert torch.equal(alone.recurrent[0], state.recurrent[-1])
