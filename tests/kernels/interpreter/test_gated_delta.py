"""Gated delta layers in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from delta_cases import SHAPES, DeltaCase, check_cuts, check_verification, relative

from sempre.kernels.activation import gate
from sempre.kernels.gated_delta import DeltaHeads
from sempre.kernels.jit import compiled
from sempre.kernels.sampling.elementary import softplus32

# rounding of what goes from kernel to kernel
ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3}


def case_of(heads: DeltaHeads, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> DeltaCase:
    from sempre.kernels.gated_delta import gpu

    return DeltaCase(heads, lengths, dtype, run=gpu.gated_delta)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("heads", SHAPES[:3])
def test_values_are_those_of_float64(heads: DeltaHeads, dtype: torch.dtype) -> None:
    case = case_of(heads, (7, 2), dtype)
    rows, state = case.whole()
    for s in range(2):
        expected, last = case.expected(s)
        assert relative(rows[s], expected) < ROUNDING[dtype]
        assert relative(state.recurrent[s], last) < ROUNDING[dtype]


def test_bits_do_not_depend_on_cuts_slots_or_neighbours() -> None:
    check_cuts(case_of(SHAPES[1], (9, 2)))


def test_a_step_may_leave_the_state_after_every_row() -> None:
    check_verification(case_of(DeltaHeads(1, 1, 16, 16, 4), (12,)))


def test_a_wider_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="gated_delta: expected a convolution of at most 4, found 5"):
        case_of(DeltaHeads(1, 1, 16, 16, 5), (3,)).whole()


@compiled()
def _softplus(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = softplus32(x[i])


def test_softplus_is_that_of_a_cpu() -> None:
    """With equal bits."""
    from softplus_kernel import softplus_on_gpu

    x = np.linspace(-90, 90, 1024, dtype=np.float32)
    expected = np.empty_like(x)
    _softplus(x, expected)
    assert np.array_equal(softplus_on_gpu(torch.from_numpy(x)).numpy(), expected)


def test_gate() -> None:
    from sempre.kernels.activation import gpu

    generator = torch.Generator().manual_seed(3)
    x, gates = torch.randn(3, 48, generator=generator), torch.randn(3, 48, generator=generator) * 9
    torch.testing.assert_close(gpu.gate(x.clone(), gates), gate(x.clone(), gates), rtol=1e-6, atol=0.0)
