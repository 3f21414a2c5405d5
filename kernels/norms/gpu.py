"""GPU RMSNorm: one program per row. T rows, H width.

The sum of squares is one tree over the whole row; its shape depends on H alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous


@jit()
def normalised(x: Any, weight: Any, width: Any, eps: Any) -> Any:
    squares = tl.sum(x * x, axis=0)
    factor = 1.0 / tl.sqrt_rn(squares / width + eps)
    return x * factor * weight.to(tl.float32)


@jit(runtime=("width", "eps"))
def _rms_norm(x: Any, weight: Any, out: Any, width: Any, eps: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    inside = i < width
    w = tl.load(weight + i, mask=inside, other=0.0)
    wait_for_previous()
    value = tl.load(x + at + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at + i, normalised(value, w, width, eps), mask=inside)


@jit(runtime=("width", "eps"))
def _add_rms_norm(x: Any, residual: Any, weight: Any, out: Any, width: Any, eps: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    inside = i < width
    w = tl.load(weight + i, mask=inside, other=0.0)
    wait_for_previous()
    value = tl.load(x + at + i, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual + at + i, mask=inside, other=0.0).to(tl.float32)
    # normalise what the next layer will read
    total = value.to(residual.dtype.element_ty)
    tl.store(residual + at + i, total, mask=inside)
    tl.store(out + at + i, normalised(total.to(tl.float32), w, width, eps), mask=inside)


@jit()
def _norm_part(at: Any, weight: Any, width: Any, eps: Any, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    inside = i < width
    w = tl.load(weight + i, mask=inside, other=0.0)
    value = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(at + i, normalised(value, w, width, eps), mask=inside)


@jit(runtime=("columns", "first_width", "second_width", "eps"))
def _rms_norm_of_parts(
    rows: Any, first: Any, second: Any, columns: Any, first_width: Any, second_width: Any, eps: Any,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
) -> None:  # fmt: skip
    at = rows + tl.program_id(0).to(tl.int64) * columns
    wait_for_previous()
    if tl.program_id(1) == 0:
        _norm_part(at, first, first_width, eps, FIRST)
    else:
        _norm_part(at + first_width, second, second_width, eps, SECOND)


def row_shape(width: int) -> tuple[int, int]:
    """Elements of a program with a whole row, a power of two, and its warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 1024))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """See the facade; float32 inside, rounded once."""
    rows, width = x.shape
    block, warps = row_shape(width)
    _rms_norm[(rows,)](x, weight, out, width, eps, BLOCK=block, num_warps=warps, **CHAINED)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """See the facade; the new residual is rounded to its dtype."""
    rows, width = x.shape
    block, warps = row_shape(width)
    _add_rms_norm[(rows,)](x, residual, weight, out, width, eps, BLOCK=block, num_warps=warps, **CHAINED)
    return out


def rms_norm_of_parts(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor, eps: float) -> torch.Tensor:
    """See the facade; a program owns one part of a row."""
    count, columns = rows.shape
    widths = len(first), len(second)
    _, warps = row_shape(max(widths))
    _rms_norm_of_parts[(count, 2)](
        rows, first, second, columns, *widths, eps,
        FIRST=triton.next_power_of_2(widths[0]), SECOND=triton.next_power_of_2(widths[1]), num_warps=warps, **CHAINED,
    )  # fmt: skip
    return rows
