"""GPU SwiGLU activation. T rows, I width."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous

BLOCK = 1024


@jit()
def silu_times(gate: Any, up: Any) -> Any:
    """silu(gate) * up in float32; the one definition, also of the fused product."""
    return gate / (1.0 + tl.exp(-gate)) * up


@jit(runtime=("width",))
def _silu_and_mul(gate_up: Any, out: Any, width: Any, BLOCK: tl.constexpr) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, silu_times(gate, up), mask=inside)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] (gates first) -> out [T, I], elementwise in float32, rounded once."""
    rows, width = out.shape
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _silu_and_mul[grid](gate_up, out, width, BLOCK=BLOCK, num_warps=4, **CHAINED)
    return out
