"""CPU activations, soft caps and gates. T rows, I width (a multiple of 16), N elements of a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange

from sempre.kernels.jit import address_of, compiled, compiled_twice, keep
from sempre.kernels.vector_ir import (
    F32,
    I64,
    LANES,
    address_intrinsic,
    constant,
    exp,
    fma,
    load,
    loop,
    splat,
    store,
    tanh,
    vec,
)

PARALLEL_ELEMENTS = 16_384

_GELU_CUBE = float(np.float32(0.044715))
_GELU_SCALE = float(np.float32(math.sqrt(2 / math.pi)))


_CLAMPED_SLOPE, _CLAMPED_MOST = float(np.float32(1.702)), 7.0


def silu(b: ir.IRBuilder, g: ir.Value) -> ir.Value:
    return _swish(b, g, b.fsub(constant(0.0), g))


def _silu_times(b: ir.IRBuilder, g: ir.Value, up: ir.Value) -> ir.Value:
    return b.fmul(silu(b, g), up)


def _swish(b: ir.IRBuilder, g: ir.Value, exponent: ir.Value) -> ir.Value:
    """g / (1 + exp(exponent))"""
    # past 88 the exponential would overflow; g / (1 + exp(88)) is already 0 to float32's precision
    capped = b.select(b.fcmp_ordered(">", exponent, constant(88.0)), constant(88.0), exponent)
    return b.fdiv(g, b.fadd(constant(1.0), exp(b, capped)))


def _gelu(b: ir.IRBuilder, g: ir.Value, up: ir.Value) -> ir.Value:
    cube = b.fmul(b.fmul(g, g), g)
    inner = b.fmul(constant(_GELU_SCALE), fma(b, constant(_GELU_CUBE), cube, g))
    return b.fmul(b.fmul(b.fmul(constant(0.5), g), b.fadd(constant(1.0), tanh(b, inner))), up)


def _clamped(b: ir.IRBuilder, g: ir.Value, up: ir.Value) -> ir.Value:
    most, least = constant(_CLAMPED_MOST), constant(-_CLAMPED_MOST)
    # comparisons with NaN are false, so it stays
    g = b.select(b.fcmp_ordered(">", g, most), most, g)
    up = b.select(b.fcmp_ordered(">", up, most), most, up)
    up = b.select(b.fcmp_ordered("<", up, least), least, up)
    return b.fmul(b.fadd(up, constant(1.0)), _swish(b, g, b.fmul(g, constant(-_CLAMPED_SLOPE))))


def _gated(activation: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """Intrinsic (gate, up, width, out): activation(gate, up) of one row."""

    def emit(b: ir.IRBuilder, gate: ir.Value, up: ir.Value, width: ir.Value, out: ir.Value) -> None:
        def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            offset = b.mul(i, I64(4))
            halves = (load(b, b.add(half, offset), vec(F32)) for half in (gate, up))
            store(b, activation(b, *halves), b.add(out, offset))
            return carried

        loop(b, I64(0), width, LANES, [], body)

    return address_intrinsic(emit)


def _emit_gate(b: ir.IRBuilder, x: ir.Value, gates: ir.Value, count: ir.Value) -> None:
    def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        at = b.add(x, offset)
        negated = b.fsub(constant(0.0), load(b, b.add(gates, offset), vec(F32)))
        store(b, _swish(b, load(b, at, vec(F32)), negated), at)
        return carried

    loop(b, I64(0), count, LANES, [], body)


def _emit_soft_cap(b: ir.IRBuilder, x: ir.Value, count: ir.Value, scale: ir.Value, cap: ir.Value) -> None:
    def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        at = b.add(x, b.mul(i, I64(4)))
        scaled = b.fmul(load(b, at, vec(F32)), splat(b, scale))
        store(b, b.fmul(tanh(b, scaled), splat(b, cap)), at)
        return carried

    loop(b, I64(0), count, LANES, [], body)


# (gate, up, width, out): silu(gate) * up of one row, whose width is a multiple of LANES
silu_and_mul_row = _gated(_silu_times)
_gelu_row = _gated(_gelu)
_clamped_row = _gated(_clamped)
_gate_row = address_intrinsic(_emit_gate)
# (x, count, scale, cap): x = cap * tanh(scale * x) of `count` elements, a multiple of LANES
soft_cap_row = address_intrinsic(_emit_soft_cap)


@compiled_twice
def _silu_and_mul(gate_up: int, rows: int, width: int, out: int) -> None:
    for t in prange(rows):
        gate = gate_up + t * 2 * width * 4
        silu_and_mul_row(gate, gate + width * 4, width, out + t * width * 4)


@compiled_twice
def _gelu_mul(gate: int, gate_step: int, up: int, up_step: int, rows: int, width: int, out: int) -> None:
    """Steps are bytes between rows."""
    for t in prange(rows):
        _gelu_row(gate + t * gate_step, up + t * up_step, width, out + t * width * 4)


@compiled_twice
def _clamped_and_mul(gate_up: int, rows: int, width: int, out: int) -> None:
    for t in prange(rows):
        gate = gate_up + t * 2 * width * 4
        _clamped_row(gate, gate + width * 4, width, out + t * width * 4)


@compiled(parallel=True)
def _soft_cap(x: np.ndarray, cap: float) -> None:
    rows, width = x.shape
    whole = width // LANES * LANES
    for t in prange(rows):
        row = address_of(x[t])
        soft_cap_row(row, whole, 1.0 / cap, cap)
        if whole < width:
            # the remaining elements, in a vector of their own
            rest = np.zeros(LANES, np.float32)
            rest[: width - whole] = x[t, whole:]
            soft_cap_row(address_of(rest), LANES, 1.0 / cap, cap)
            x[t, whole:] = rest[: width - whole]
            keep(rest)


@compiled_twice
def _gate(x: int, gates: int, rows: int, width: int) -> None:
    for t in prange(rows):
        _gate_row(x + t * width * 4, gates + t * width * 4, width)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    rows, width = out.shape
    run = _silu_and_mul.parallel if out.numel() >= PARALLEL_ELEMENTS else _silu_and_mul.serial
    run(gate_up.data_ptr(), rows, width, out.data_ptr())
    return out


def gelu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    gate, up = gate_up.chunk(2, dim=1)
    return gelu_mul(gate, up, out)


def gelu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade; the rows of `gate` may lie apart too."""
    rows, width = out.shape
    steps = gate.stride(0) * 4, up.stride(0) * 4
    run = _gelu_mul.parallel if out.numel() >= PARALLEL_ELEMENTS else _gelu_mul.serial
    run(gate.data_ptr(), steps[0], up.data_ptr(), steps[1], rows, width, out.data_ptr())
    return out


def clamped_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    rows, width = out.shape
    run = _clamped_and_mul.parallel if out.numel() >= PARALLEL_ELEMENTS else _clamped_and_mul.serial
    run(gate_up.data_ptr(), rows, width, out.data_ptr())
    return out


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """See the facade."""
    _soft_cap(x.numpy(), cap)
    return x


def gate(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """As the facade."""
    run = _gate.parallel if x.numel() >= PARALLEL_ELEMENTS else _gate.serial
    run(x.data_ptr(), gates.data_ptr(), *x.shape)
    return x
