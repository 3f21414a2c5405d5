"""CPU quantisation of rows, widened or as bytes. T rows, K elements (a multiple of 16)."""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import prange, types

from sempre.kernels.jit import compiled_twice
from sempre.kernels.vector_ir import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    address_intrinsic,
    constant,
    int_constant,
    load,
    loop,
    splat,
    store,
    tree_max,
    vec,
)

PARALLEL_ELEMENTS = 16_384
LARGEST, SMALLEST_SCALE = 448.0, 2.0**-64
# below this the fp8 values are evenly spaced, 2**-9 apart; so are the float32 values around EVEN_SPACING
SMALLEST_NORMAL = 2.0**-6
EVEN_SPACING = 1.5 * 2.0**14
DROPPED_BITS = 20


def _emit_rounded(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The fp8 value nearest to each float32 lane of at most 448, ties to even; NaN stays NaN."""
    bits = b.bitcast(value, vec(I32))
    magnitude = b.bitcast(b.and_(bits, int_constant(0x7FFF_FFFF)), vec(F32))
    odd = b.and_(b.lshr(bits, int_constant(DROPPED_BITS)), int_constant(1))
    carried = b.add(bits, b.add(odd, int_constant((1 << (DROPPED_BITS - 1)) - 1)))
    normal = b.bitcast(b.and_(carried, int_constant(-(1 << DROPPED_BITS))), vec(F32))
    spacing = constant(EVEN_SPACING)
    tiny = b.fsub(b.fadd(value, spacing), spacing)
    rounded = b.select(b.fcmp_ordered("<", magnitude, constant(SMALLEST_NORMAL)), tiny, normal)
    return b.select(b.fcmp_unordered("uno", value, value), value, rounded)


def _emit_scale(b: ir.IRBuilder, x: ir.Value, width: ir.Value) -> ir.Value:
    """The row's scale; NaN does not count."""

    def largest(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        bits = load(b, b.add(x, b.mul(i, I64(4))), vec(I32))
        magnitude = b.bitcast(b.and_(bits, int_constant(0x7FFF_FFFF)), vec(F32))
        return [b.select(b.fcmp_ordered(">", magnitude, carried[0]), magnitude, carried[0])]

    amax = tree_max(b, loop(b, I64(0), width, LANES, [constant(0.0)], largest)[0])
    scale = b.fdiv(amax, ir.Constant(F32, LARGEST))
    least = ir.Constant(F32, SMALLEST_SCALE)
    return b.select(b.fcmp_ordered(">", scale, least), scale, least)


def _emit_row(b: ir.IRBuilder, x: ir.Value, width: ir.Value, out: ir.Value, scale_at: ir.Value) -> None:
    scale = _emit_scale(b, x, width)
    store(b, scale, scale_at)
    divisor = splat(b, scale)

    def quantize(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        value = b.fdiv(load(b, b.add(x, offset), vec(F32)), divisor)
        store(b, _emit_rounded(b, value), b.add(out, offset))
        return carried

    loop(b, I64(0), width, LANES, [], quantize)


def _emit_bytes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The bytes of float32 lanes that are fp8 values: a float16 times 2**-8 has the same bits, seven places higher."""
    half = b.fptrunc(b.fmul(value, constant(2.0**-8)), vec(F16))
    bits = b.bitcast(half, vec(I16))

    def each(mask: int) -> ir.Constant:
        return ir.Constant(vec(I16), [mask] * LANES)

    sign, magnitude = b.and_(b.lshr(bits, each(8)), each(0x80)), b.and_(b.lshr(bits, each(7)), each(0x7F))
    return b.trunc(b.or_(sign, magnitude), vec(I8))


def _emit_row_as_bytes(b: ir.IRBuilder, x: ir.Value, width: ir.Value, out: ir.Value, scale_at: ir.Value) -> ir.Value:
    scale = _emit_scale(b, x, width)
    store(b, scale, scale_at)
    divisor = splat(b, scale)
    flags = ir.VectorType(ir.IntType(1), LANES)

    def quantize(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        value = load(b, b.add(x, b.mul(i, I64(4))), vec(F32))
        store(b, _emit_bytes(b, _emit_rounded(b, b.fdiv(value, divisor))), b.add(out, i))
        return [b.or_(carried[0], b.fcmp_unordered("uno", value, value))]

    (is_nan,) = loop(b, I64(0), width, LANES, [ir.Constant(flags, [0] * LANES)], quantize)
    # twice the greatest value that can be read, which must not overflow
    greatest = b.fmul(scale, ir.Constant(F32, 2 * LARGEST))
    is_finite = b.fcmp_ordered("<", greatest, ir.Constant(F32, float("inf")))
    has_no_nan = b.icmp_unsigned("==", b.bitcast(is_nan, ir.IntType(LANES)), ir.IntType(LANES)(0))
    return b.zext(b.and_(is_finite, has_no_nan), I64)


quantize_to_bytes = address_intrinsic(_emit_row_as_bytes, returns=types.int64)
"""(x, K, out, scale): the row of K float32 at x, quantised into K bytes at `out` and a float32 at `scale`, for use
inside kernels. 1 if what is read of it, bytes times scale, is finite; 0 for rows with NaN, or with magnitudes of 2**127
or more, whose bytes mean nothing."""
_row = address_intrinsic(_emit_row)


@compiled_twice
def _quantize_rows(x: int, rows: int, width: int, out: int, scales: int) -> None:
    for t in prange(rows):
        _row(x + t * width * 4, width, out + t * width * 4, scales + t * 4)


def quantize_rows(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Into out [T, K] float32 (fp8 values) and scales [T] float32; returns both."""
    rows, width = x.shape
    run = _quantize_rows.parallel if x.numel() >= PARALLEL_ELEMENTS else _quantize_rows.serial
    run(x.data_ptr(), rows, width, out.data_ptr(), scales.data_ptr())
    return out, scales
