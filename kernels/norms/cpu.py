"""CPU RMSNorm. T rows, H width."""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import prange

from sempre.kernels.jit import compiled_twice
from sempre.kernels.vector_ir import (
    F32,
    I64,
    LANES,
    address_intrinsic,
    constant,
    fma,
    llvm_sqrt,
    load,
    loop,
    splat,
    store,
    tree_sum,
    vec,
)


def emit_rms_norm(
    b: ir.IRBuilder, x: ir.Value, weight: ir.Value | None, width: ir.Value, eps: ir.Value, out: ir.Value
) -> None:
    """Normalise the row of `width` float32 values at address `x` into `out` (which may be `x`); None: no weight."""

    def square(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        value = load(b, b.add(x, b.mul(i, I64(4))), vec(F32))
        return [fma(b, value, value, carried[0])]

    [squares] = loop(b, I64(0), width, LANES, [constant(0.0)], square)
    mean = b.fdiv(tree_sum(b, squares), b.sitofp(width, F32))
    factor = splat(b, b.fdiv(F32(1.0), llvm_sqrt(b, b.fadd(mean, eps))))

    def scale(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        value = b.fmul(load(b, b.add(x, offset), vec(F32)), factor)
        if weight is not None:
            value = b.fmul(value, load(b, b.add(weight, offset), vec(F32)))
        store(b, value, b.add(out, offset))
        return carried

    loop(b, I64(0), width, LANES, [], scale)


def emit_unweighted_rms_norm(b: ir.IRBuilder, x: ir.Value, width: ir.Value, eps: ir.Value, out: ir.Value) -> None:
    """The same, without a weight."""
    emit_rms_norm(b, x, None, width, eps, out)


def _emit_add(b: ir.IRBuilder, x: ir.Value, residual: ir.Value, width: ir.Value) -> None:
    def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        at = b.add(residual, offset)
        store(b, b.fadd(load(b, at, vec(F32)), load(b, b.add(x, offset), vec(F32))), at)
        return carried

    loop(b, I64(0), width, LANES, [], body)


_rms_norm_row = address_intrinsic(emit_rms_norm)
_add_row = address_intrinsic(_emit_add)


@compiled_twice
def _rms_norm(x: int, weight: int, rows: int, width: int, eps: float, out: int) -> None:
    for t in prange(rows):
        _rms_norm_row(x + t * width * 4, weight, width, eps, out + t * width * 4)


@compiled_twice
def _add_rms_norm(x: int, residual: int, weight: int, rows: int, width: int, eps: float, out: int) -> None:
    for t in prange(rows):
        row = t * width * 4
        _add_row(x + row, residual + row, width)
        _rms_norm_row(residual + row, weight, width, eps, out + row)


@compiled_twice
def _rms_norm_of_parts(
    x: int, rows: int, columns: int, first: int, width: int, second: int, rest: int, eps: float
) -> None:
    for t in prange(rows):
        row = x + t * columns * 4
        _rms_norm_row(row, first, width, eps, row)
        _rms_norm_row(row + width * 4, second, rest, eps, row + width * 4)


PARALLEL_ELEMENTS = 65_536  # below, starting the threads costs more than they save


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """See the facade; `out` may be `x`."""
    rows, width = x.shape
    run = _rms_norm.parallel if x.numel() >= PARALLEL_ELEMENTS else _rms_norm.serial
    run(x.data_ptr(), weight.data_ptr(), rows, width, eps, out.data_ptr())
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """See the facade."""
    rows, width = x.shape
    run = _add_rms_norm.parallel if x.numel() >= PARALLEL_ELEMENTS else _add_rms_norm.serial
    run(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), rows, width, eps, out.data_ptr())
    return out


def rms_norm_of_parts(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor, eps: float) -> torch.Tensor:
    """As the facade."""
    count, columns = rows.shape
    run = _rms_norm_of_parts.parallel if rows.numel() >= PARALLEL_ELEMENTS else _rms_norm_of_parts.serial
    run(rows.data_ptr(), count, columns, first.data_ptr(), len(first), second.data_ptr(), len(second), eps)
    return rows
