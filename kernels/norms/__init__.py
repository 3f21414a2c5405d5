"""RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight, a row at a time (Zhang and Sennrich 2019, arXiv 1910.07467).

Contract: float32 inside, IEEE division and square root, one tree for the sum of squares. On CPU it runs in 16 lanes
over ascending chunks by fused multiply-add, then a fixed tree over the lanes, and the width must be a multiple of 16;
on a GPU it is a tree over the row whose shape depends on the width alone, and results are rounded once.
"""

from __future__ import annotations

import torch

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """x [T, H], weight [H] -> out [T, H]."""
    if not x.is_cuda:
        from sempre.kernels.norms import cpu

        return cpu.rms_norm(x, weight, eps, out)
    from sempre.kernels.norms import gpu

    return gpu.rms_norm(x, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """residual += x in place, then out = rms_norm(residual), with equal bits as the two in turn."""
    if not x.is_cuda:
        from sempre.kernels.norms import cpu

        return cpu.add_rms_norm(x, residual, weight, eps, out)
    from sempre.kernels.norms import gpu

    return gpu.add_rms_norm(x, residual, weight, eps, out)
