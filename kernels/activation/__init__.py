"""Elementwise operations: activations of gated feed-forward branches, soft caps, and gates.

silu_and_mul: out = silu(gate) * up, silu(g) = g / (1 + exp(-g)); gelu_and_mul: out = gelu(gate) * up with
gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))) (Shazeer 2020, arXiv 2002.05202; Hendrycks and Gimpel
2016, arXiv 1606.08415); gelu_mul: the same of two tensors; clamped_and_mul: out = (up + 1) * g / (1 + exp(-1.702 g))
with g = min(gate, 7), and up within -7 and 7 (gpt-oss, arXiv 2508.10925). soft_cap: x = cap * tanh(x / cap) (Gemma 2,
arXiv 2408.00118). gate: x = x / (1 + exp(-g)).

Contract: elementwise in float32, rounded once. On a CPU exponential and tanh are the project's own polynomials; on a
GPU the exponential is the hardware's, and tanh is a polynomial near 0 and derived from the exponential elsewhere.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.activation import cpu as _cpu
    from sempre.kernels.activation import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["Activation", "clamped_and_mul", "gate", "gelu_and_mul", "gelu_mul", "silu_and_mul", "soft_cap"]


class Activation(Enum):
    """Of the gates of a gated feed-forward branch."""

    SILU = "silu"
    GELU = "gelu"
    """by tanh"""
    CLAMPED = "clamped"
    """with gates and the other half both clamped"""

    def and_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2 I] (gates first) -> out [T, I]."""
        match self:
            case Activation.SILU:
                return silu_and_mul(gate_up, out)
            case Activation.GELU:
                return gelu_and_mul(gate_up, out)
            case Activation.CLAMPED:
                return clamped_and_mul(gate_up, out)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] (gates first) -> out [T, I]."""
    _check_gated("silu_and_mul", gate_up, out)
    if not out.shape[0]:
        return out
    if not gate_up.is_cuda:
        return _cpu.silu_and_mul(gate_up, out)
    return _gpu.silu_and_mul(gate_up, out)


def gelu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] (gates first) -> out [T, I]. On a CPU, I must be a multiple of 16."""
    _check_gated("gelu_and_mul", gate_up, out)
    if not out.shape[0]:
        return out
    if not gate_up.is_cuda:
        _check_vectors("gelu_and_mul", out)
        return _cpu.gelu_and_mul(gate_up, out)
    return _gpu.gelu_and_mul(gate_up, out)


def clamped_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] (gates first) -> out [T, I]. On a CPU, I must be a multiple of 16."""
    _check_gated("clamped_and_mul", gate_up, out)
    if not out.shape[0]:
        return out
    if not gate_up.is_cuda:
        _check_vectors("clamped_and_mul", out)
        return _cpu.clamped_and_mul(gate_up, out)
    return _gpu.activate_and_mul(gate_up, out, Activation.CLAMPED)


def gelu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate [T, I], up [T, I], whose rows may lie apart, -> out [T, I]. On a CPU, I must be a multiple of 16."""
    check_rows("gelu_mul", gate, out)
    fits = gate.shape == up.shape == out.shape and up.stride(1) == 1
    if not fits or up.dtype is not gate.dtype or up.device != gate.device:
        raise ValueError(
            f"gelu_mul: gate {tuple(gate.shape)} and up {tuple(up.shape)}, {up.dtype}, do not fit an output of"
            f" {tuple(out.shape)}, {out.dtype}"
        )
    if not out.shape[0]:
        return out
    if not gate.is_cuda:
        _check_vectors("gelu_mul", out)
        return _cpu.gelu_mul(gate, up, out)
    return _gpu.gelu_mul(gate, up, out)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """x [T, N], in place. ValueError for a cap that is not positive."""
    check_rows("soft_cap", x, x)
    if not cap > 0:
        raise ValueError(f"soft_cap: expected a cap above 0, found {cap}")
    if not x.shape[0]:
        return x
    if not x.is_cuda:
        return _cpu.soft_cap(x, cap)
    return _gpu.soft_cap(x, cap)


def gate(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """x [T, N] times the sigmoid of gates [T, N], in place. On a CPU, N must be a multiple of 16."""
    check_rows("gate", x, gates)
    if x.shape != gates.shape:
        raise ValueError(f"gate: gates {tuple(gates.shape)} do not fit x {tuple(x.shape)}")
    if not x.shape[0]:
        return x
    if not x.is_cuda:
        if x.shape[1] % 16:
            raise ValueError(f"gate: expected a width that is a multiple of 16, found {x.shape[1]}")
        return _cpu.gate(x, gates)
    return _gpu.gate(x, gates)


def _check_gated(operation: str, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    check_rows(operation, gate_up, out)
    if gate_up.shape[1] != 2 * out.shape[1] or gate_up.shape[0] < out.shape[0]:
        raise ValueError(f"{operation}: {tuple(gate_up.shape)} does not fit an output of {tuple(out.shape)}")


def _check_vectors(operation: str, out: torch.Tensor) -> None:
    if out.shape[1] % 16:
        raise ValueError(f"{operation}: expected a width that is a multiple of 16, found {out.shape[1]}")
