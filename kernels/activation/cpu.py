"""CPU SwiGLU activation. T rows, I width (a multiple of 16)."""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import prange

from sempre.kernels.jit import compiled
from sempre.kernels.vector_ir import F32, I64, LANES, address_intrinsic, constant, exp, load, loop, store, vec

PARALLEL_ELEMENTS = 16_384


def _emit_row(b: ir.IRBuilder, gate: ir.Value, up: ir.Value, width: ir.Value, out: ir.Value) -> None:
    def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        g = load(b, b.add(gate, offset), vec(F32))
        negated = b.fsub(constant(0.0), g)
        # past 88 the exponential would overflow; g / (1 + exp(88)) is already 0 to float32's precision
        capped = b.select(b.fcmp_ordered(">", negated, constant(88.0)), constant(88.0), negated)
        silu = b.fdiv(g, b.fadd(constant(1.0), exp(b, capped)))
        store(b, b.fmul(silu, load(b, b.add(up, offset), vec(F32))), b.add(out, offset))
        return carried

    loop(b, I64(0), width, LANES, [], body)


_row = address_intrinsic(_emit_row)


@compiled()
def _silu_and_mul(gate_up: int, rows: int, width: int, out: int) -> None:
    for t in range(rows):
        gate = gate_up + t * 2 * width * 4
        _row(gate, gate + width * 4, width, out + t * width * 4)


@compiled(parallel=True)
def _silu_and_mul_parallel(gate_up: int, rows: int, width: int, out: int) -> None:
    for t in prange(rows):
        gate = gate_up + t * 2 * width * 4
        _row(gate, gate + width * 4, width, out + t * width * 4)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] (gates first) -> out [T, I]."""
    rows, width = out.shape
    run = _silu_and_mul_parallel if out.numel() >= PARALLEL_ELEMENTS else _silu_and_mul
    run(gate_up.data_ptr(), rows, width, out.data_ptr())
    return out
