"""GPU quantisation of rows: one program per row. T rows, K elements."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous


@jit()
def _rounded(value: Any) -> Any:
    """The fp8 value nearest to each float32 of at most 448, ties to even, spelled out so that no device's own
    conversion is used; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    carried = bits + ((bits >> 20) & 1) + 0x7FFFF
    normal = (carried & -0x100000).to(tl.float32, bitcast=True)
    # below 2**-6 the fp8 values are evenly spaced, as float32 values are around 1.5 * 2**14
    tiny = (value + 24576.0) - 24576.0
    rounded = tl.where(tl.abs(value) < 0.015625, tiny, normal)
    return tl.where(value == value, rounded, value)


@jit(runtime=("width",))
def _quantize_rows(x: Any, out: Any, scales: Any, width: Any, BLOCK: tl.constexpr) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    value = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(value), axis=0), 448.0)
    # 2**-64
    scale = tl.where(scale > 5.421010862427522e-20, scale, 5.421010862427522e-20)
    tl.store(scales + row, scale)
    tl.store(out + row * width + i, _rounded(tl.div_rn(value, scale)).to(tl.float8e4nv), mask=inside)


def quantize_rows(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Into out [T, K] fp8 and scales [T] float32; returns both."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 1024))
    _quantize_rows[(rows,)](x, out, scales, width, BLOCK=block, num_warps=warps, **CHAINED)
    return out, scales
