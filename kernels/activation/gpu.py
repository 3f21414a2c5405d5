"""GPU activations of gated feed-forward branches, soft caps and gates. T rows, I width, N elements of a row."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.activation import Activation
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous

BLOCK = 1024

_GELU_CUBE = tl.constexpr(0.044715)
_GELU_SCALE = tl.constexpr(math.sqrt(2 / math.pi))
_CLAMPED_SLOPE, _CLAMPED_MOST = tl.constexpr(1.702), tl.constexpr(7.0)
# the CPU's polynomial (`vector_ir.tanh`)
_TANH_SMALL, _TANH_LARGEST = tl.constexpr(0.625), tl.constexpr(44.0)
_T0, _T1, _T2 = tl.constexpr(-3.33332819422e-1), tl.constexpr(1.33314422036e-1), tl.constexpr(-5.37397155531e-2)
_T3, _T4 = tl.constexpr(2.06390887954e-2), tl.constexpr(-5.70498872745e-3)


@jit()
def silu_times(gate: Any, up: Any) -> Any:
    """silu(gate) * up in float32; the only definition, shared with the fused matmul."""
    return gate / (1.0 + tl.exp(-gate)) * up


@jit()
def tanh32(x: Any) -> Any:
    """tanh of a float32 tensor, to full relative precision near 0; NaN stays NaN. One definition for all kernels: every
    operation is spelled out, so that surrounding code cannot change the bits."""
    magnitude = tl.abs(x)
    capped = tl.where(magnitude > _TANH_LARGEST, _TANH_LARGEST, magnitude)
    large = 1.0 - 2.0 / (tl.exp(capped + capped) + 1.0)
    square = x * x
    p = (((square * _T4 + _T3) * square + _T2) * square + _T1) * square + _T0
    return tl.where(magnitude < _TANH_SMALL, p * square * x + x, tl.where(x < 0.0, -large, large))


@jit()
def soft_capped(x: Any, scale: Any, cap: Any) -> Any:
    """cap * tanh(scale * x) in float32."""
    return tanh32(x * scale) * cap


@jit()
def gelu_times(gate: Any, up: Any) -> Any:
    """gelu(gate) * up in float32, gelu by tanh."""
    inner = (gate * gate * gate * _GELU_CUBE + gate) * _GELU_SCALE
    return 0.5 * gate * (1.0 + tanh32(inner)) * up


@jit()
def clamped_times(gate: Any, up: Any) -> Any:
    """(up + 1) gate / (1 + exp(-1.702 gate)) in float32, both clamped; NaN, with which comparisons are false, stays."""
    gate = tl.where(gate > _CLAMPED_MOST, _CLAMPED_MOST, gate)
    up = tl.where(up > _CLAMPED_MOST, _CLAMPED_MOST, tl.where(up < -_CLAMPED_MOST, -_CLAMPED_MOST, up))
    return gate / (1.0 + tl.exp(gate * -_CLAMPED_SLOPE)) * (up + 1.0)


@jit()
def activated(gate: Any, up: Any, ACTIVATION: tl.constexpr) -> Any:
    """The two halves of a gated branch in float32 -> their activation, whose name ACTIVATION is."""
    if ACTIVATION == "silu":
        value = silu_times(gate, up)
    elif ACTIVATION == "gelu":
        value = gelu_times(gate, up)
    else:
        tl.static_assert(ACTIVATION == "clamped")
        value = clamped_times(gate, up)
    return value


@jit(runtime=("gate_step", "up_step", "width"))
def _gated(
    gates: Any,
    ups: Any,
    out: Any,
    gate_step: Any,
    up_step: Any,
    width: Any,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = tl.load(gates + row * gate_step + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + row * up_step + i, mask=inside, other=0.0).to(tl.float32)
    at = out + row * width + i
    tl.store(at, activated(gate, up, ACTIVATION), mask=inside)


@jit(runtime=("count", "scale", "cap"))
def _soft_cap(x: Any, count: Any, scale: Any, cap: Any, BLOCK: tl.constexpr) -> None:
    wait_for_previous()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(x + i, soft_capped(value, scale, cap), mask=i < count)


@jit(runtime=("count",))
def _gate(x: Any, gates: Any, count: Any, BLOCK: tl.constexpr) -> None:
    wait_for_previous()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + i, value / (1.0 + tl.exp(-g)), mask=inside)


def activate_and_mul(gate_up: torch.Tensor, out: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As the facade's `activation.and_mul`."""
    gate, up = gate_up.chunk(2, dim=1)
    return _activate(gate, up, out, activation)


def _activate(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: Activation) -> torch.Tensor:
    rows, width = out.shape
    _gated[(rows, triton.cdiv(width, BLOCK))](
        gate,
        up,
        out,
        gate.stride(0),
        up.stride(0),
        width,
        BLOCK=BLOCK,
        ACTIVATION=activation.value,
        num_warps=4,
        **CHAINED,
    )
    return out


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    return activate_and_mul(gate_up, out, Activation.SILU)


def gelu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    return activate_and_mul(gate_up, out, Activation.GELU)


def gelu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade; the rows of `gate` may lie apart too."""
    return _activate(gate, up, out, Activation.GELU)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """See the facade."""
    count = x.numel()
    _soft_cap[(triton.cdiv(count, BLOCK),)](x, count, 1.0 / cap, cap, BLOCK=BLOCK, num_warps=4, **CHAINED)
    return x


def gate(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """As the facade."""
    count = x.numel()
    _gate[(triton.cdiv(count, BLOCK),)](x, gates, count, BLOCK=BLOCK, num_warps=4, **CHAINED)
    return x
