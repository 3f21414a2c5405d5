"""RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight, a row at a time (Zhang and Sennrich 2019, arXiv 1910.07467).

Contract: float32 inside, IEEE division and square root, one tree for the sum of squares. On CPU it runs in 16 lanes
over ascending chunks by fused multiply-add, then a fixed tree over the lanes, and the width must be a multiple of 16;
on a GPU it is a tree over the row whose shape depends on the width alone, and results are rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.norms import cpu as _cpu
    from sempre.kernels.norms import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_of_parts"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """x [T, H], weight [H] -> out [T, H]."""
    check_rows("rms_norm", x, out)
    _check_shapes("rms_norm", x, weight, out)
    if not x.shape[0]:
        return out
    if not x.is_cuda:
        return _cpu.rms_norm(x, weight, eps, out)
    return _gpu.rms_norm(x, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """residual += x in place, then out = rms_norm(residual); the same bits as the two in sequence."""
    check_rows("add_rms_norm", x, out)
    check_rows("add_rms_norm", residual, out)
    _check_shapes("add_rms_norm", residual, weight, out)
    if x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: x {tuple(x.shape)} does not fit a residual of {tuple(residual.shape)}")
    if not x.shape[0]:
        return out
    if not x.is_cuda:
        return _cpu.add_rms_norm(x, residual, weight, eps, out)
    return _gpu.add_rms_norm(x, residual, weight, eps, out)


def rms_norm_of_parts(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm two parts of rows [T, N], each by itself and in place: the first columns, as many as the weight `first` has,
    and then as many as `second` has. The other columns stay."""
    check_rows("rms_norm_of_parts", rows, rows)
    widths = first.shape[0], second.shape[0]
    if sum(widths) > rows.shape[1]:
        raise ValueError(f"rms_norm_of_parts: weights of {widths} do not fit rows {tuple(rows.shape)}")
    if not rows.shape[0]:
        return rows
    if not rows.is_cuda:
        return _cpu.rms_norm_of_parts(rows, first, second, eps)
    return _gpu.rms_norm_of_parts(rows, first, second, eps)


def _check_shapes(operation: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if out.shape != x.shape or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"{operation}: weight {tuple(weight.shape)} and out {tuple(out.shape)} do not fit x {tuple(x.shape)}"
        )
