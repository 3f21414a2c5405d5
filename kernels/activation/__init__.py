"""SwiGLU's activation: out = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (Shazeer 2020, arXiv 2002.05202).

Contract: elementwise in float32; the exponential is the project's own polynomial on CPU and the hardware's on a GPU.
"""

from __future__ import annotations

import torch

from sempre.kernels.checks import check_rows

__all__ = ["silu_and_mul"]


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] (gates first) -> out [T, I]."""
    check_rows("silu_and_mul", gate_up, out)
    if gate_up.shape[1] != 2 * out.shape[1] or gate_up.shape[0] < out.shape[0]:
        raise ValueError(f"silu_and_mul: {tuple(gate_up.shape)} does not fit an output of {tuple(out.shape)}")
    if not gate_up.is_cuda:
        from sempre.kernels.activation import cpu

        return cpu.silu_and_mul(gate_up, out)
    from sempre.kernels.activation import gpu

    return gpu.silu_and_mul(gate_up, out)
