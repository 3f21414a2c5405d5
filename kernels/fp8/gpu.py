"""GPU quantisation of rows: one program per row. T rows, K elements."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, architecture, jit, wait_for_previous


@jit()
def _rounded(value: Any) -> Any:
    """The fp8 value nearest to each float32 of at most 448, ties to even; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    carried = bits + ((bits >> 20) & 1) + 0x7FFFF
    normal = (carried & -0x100000).to(tl.float32, bitcast=True)
    # below 2**-6 the fp8 values are evenly spaced, as float32 values are around 1.5 * 2**14
    tiny = (value + 24576.0) - 24576.0
    rounded = tl.where(tl.abs(value) < 0.015625, tiny, normal)
    return tl.where(value == value, rounded, value)


@jit()
def _divided(value: Any, scale: Any) -> Any:
    """`tl.div_rn`, in a fifth of its instructions: each quotient from the one correctly rounded reciprocal.

    The first correction makes it one of the two nearest float32 values, and then the second rounds it correctly
    (Markstein 1990, IBM J. Res. Dev. 34). Not corrected is what an infinite scale has made zero; what rounds to the
    fp8 zero is zero without a sign, as `_rounded` has it.
    """
    reciprocal = tl.div_rn(1.0, scale)
    minus = -scale
    first = value * reciprocal
    near = tl.fma(tl.fma(first, minus, value), reciprocal, first)
    quotient = tl.where(first == 0.0, 0.0, tl.fma(tl.fma(near, minus, value), reciprocal, near))
    return tl.where(tl.abs(quotient) <= 0.0009765625, 0.0, quotient)


@jit(runtime=("width",))
def _quantize_rows(x: Any, out: Any, scales: Any, width: Any, BLOCK: tl.constexpr, SPELLED: tl.constexpr) -> None:
    """SPELLED: on no GPU, where a fused multiply-add rounds twice and conversion is not to the nearest."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    value = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(value), axis=0), 448.0)
    # 2**-64
    scale = tl.where(scale > 5.421010862427522e-20, scale, 5.421010862427522e-20)
    tl.store(scales + row, scale)
    if SPELLED:
        quotient = _rounded(tl.div_rn(value, scale))
    else:
        quotient = _divided(value, scale)
    tl.store(out + row * width + i, quotient.to(tl.float8e4nv), mask=inside)


def quantize_rows(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Into out [T, K] fp8 and scales [T] float32; returns both."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 1024))
    spelled = architecture(x.device) == "any"
    _quantize_rows[(rows,)](x, out, scales, width, BLOCK=block, SPELLED=spelled, num_warps=warps, **CHAINED)
    return out, scales
