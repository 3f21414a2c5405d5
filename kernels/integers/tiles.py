"""Tiles of the integer matmul: a few rows of quantised activations by one panel of 32 outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from sempre.kernels.integers import BLOCK, Layout
from sempre.kernels.native import Native, NativeGroup
from sempre.kernels.vector_ir import F32, I8, I16, I32, I64, LANES, constant, fma, load, loop, splat, store, vec

VECTORS = 2
TILE_ROWS = (4, 2, 1)
QUAD = 4
# bytes of the codes of one vector of outputs, four inputs each
VECTOR_BYTES = LANES * QUAD

Dot = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
"""(sums int32 [16], codes uint8 [64], four int8 of x as one int32) → sums plus the dot products of four"""


class MissingInstructions(Exception):
    """The CPU, or what code may be generated for, has no fused multiply-add."""


def machine_features() -> frozenset[str]:
    """The instruction sets that code may use, by LLVM's names."""
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


def dot_kind(features: frozenset[str]) -> str:
    """Which instructions multiply the integers. Raises MissingInstructions."""
    if not features & {"fma", "avx512f", "neon"}:
        raise MissingInstructions("integers: expected a CPU with fused multiply-adds (FMA), found none")
    if {"avx512vnni", "avx512f"} <= features:
        return "vnni512"
    if "avxvnni" in features:
        return "vnni256"
    return "avx2" if "avx2" in features else "plain"


def _part(b: ir.IRBuilder, value: ir.Value, first: int, count: int) -> ir.Value:
    undefined = ir.Constant(value.type, ir.Undefined)
    return b.shuffle_vector(value, undefined, ir.Constant(vec(I32, count), list(range(first, first + count))))


def _joined(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        mask = ir.Constant(vec(I32, count), list(range(count)))
        parts = [b.shuffle_vector(parts[i], parts[i + 1], mask) for i in range(0, len(parts), 2)]
    return parts[0]


def _call(b: ir.IRBuilder, name: str, returns: ir.Type, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _vnni(b: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """VPDPBUSD: bytes of the second operand are unsigned, those of the third signed; sums do not saturate."""
    lanes = sums.type.count
    wide = splat(b, x, lanes)
    # its operands are bytes from LLVM 21 on
    if llvm.llvm_version_info[0] >= 21:
        wide = b.bitcast(wide, codes.type)
    else:
        codes = b.bitcast(codes, sums.type)
    return _call(b, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums.type, sums, codes, wide)


def _vnni_halves(b: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    half, num_bytes = LANES // 2, VECTOR_BYTES // 2
    parts = [(_part(b, sums, half * i, half), _part(b, codes, num_bytes * i, num_bytes)) for i in range(2)]
    return _joined(b, [_vnni(b, *part, x) for part in parts])


def _avx2(b: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """VPMADDWD of 16-bit numbers: sums of pairs are exact, unlike those of VPMADDUBSW, which saturate."""
    four = b.sext(b.bitcast(splat(b, x, 4), vec(I8, 16)), vec(I16, 16))
    pairs = []
    for start in range(0, VECTOR_BYTES, 16):
        wide = b.zext(_part(b, codes, start, 16), vec(I16, 16))
        pairs.append(_call(b, "llvm.x86.avx2.pmadd.wd", vec(I32, 8), wide, four))
    both = _joined(b, pairs)
    undefined = ir.Constant(both.type, ir.Undefined)
    even, odd = (
        b.shuffle_vector(both, undefined, ir.Constant(vec(I32), [2 * lane + side for lane in range(LANES)]))
        for side in range(2)
    )
    return b.add(sums, b.add(even, odd))


def _plain(b: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """Products of 32-bit numbers."""
    undefined = ir.Constant(codes.type, ir.Undefined)
    for place in range(QUAD):
        mask = ir.Constant(vec(I32), [QUAD * lane + place for lane in range(LANES)])
        column = b.zext(b.shuffle_vector(codes, undefined, mask), vec(I32))
        one = b.sext(b.trunc(b.lshr(x, I32(8 * place)), I8), I32)
        sums = b.add(sums, b.mul(column, splat(b, one)))
    return sums


DOTS: dict[str, Dot] = {"vnni512": _vnni, "vnni256": _vnni_halves, "avx2": _avx2, "plain": _plain}


@dataclass(frozen=True)
class _Operands:
    """Addresses; rows of what belongs to x and out begin so many bytes apart."""

    x: ir.Value
    x_row: ir.Value
    scales: ir.Value
    scales_row: ir.Value
    totals: ir.Value
    totals_row: ir.Value
    codes: ir.Value
    scale: ir.Value
    minimum: ir.Value
    groups: ir.Value
    out: ir.Value
    out_row: ir.Value


def _loaded_codes(b: ir.IRBuilder, at: ir.Value, layout: Layout) -> list[list[ir.Value]]:
    """The codes of a group: for each four inputs, those of each vector of outputs."""
    quads: list[list[ir.Value]] = []
    bytes_of_four = VECTORS * VECTOR_BYTES
    stored = layout.group // QUAD // (2 if layout.bits == 4 else 1)
    kind = vec(I8, VECTOR_BYTES)
    for i in range(stored):
        each = [load(b, b.add(at, I64(i * bytes_of_four + j * VECTOR_BYTES)), kind) for j in range(VECTORS)]
        if layout.bits == 8:
            quads.append(each)
        else:
            low = ir.Constant(kind, [15] * VECTOR_BYTES)
            four = ir.Constant(kind, [4] * VECTOR_BYTES)
            quads.append([b.and_(codes, low) for codes in each])
            quads.append([b.lshr(codes, four) for codes in each])
    return quads


def _emit_tile(b: ir.IRBuilder, rows: int, layout: Layout, dot: Dot, t: _Operands) -> None:
    places = [(r, j) for r in range(rows) for j in range(VECTORS)]
    group_bytes = layout.group * layout.bits // 8 * LANES * VECTORS

    def row(base: ir.Value, stride: ir.Value, r: int) -> ir.Value:
        return b.add(base, b.mul(stride, I64(r)))

    def group(b: ir.IRBuilder, g: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        first = b.mul(g, I64(layout.group))
        block = b.mul(b.lshr(first, I64(BLOCK.bit_length() - 1)), I64(4))
        totals = [load(b, b.add(row(t.totals, t.totals_row, r), b.mul(g, I64(4))), I32) for r in range(rows)]
        started = [splat(b, b.mul(total, I32(-layout.offset))) for total in totals]
        dots = [started[r] for r, _ in places]
        for quad, codes in enumerate(_loaded_codes(b, b.add(t.codes, b.mul(g, I64(group_bytes))), layout)):
            at = b.add(first, I64(QUAD * quad))
            fours = [load(b, b.add(row(t.x, t.x_row, r), at), I32) for r in range(rows)]
            dots = [dot(b, sum_, codes[j], fours[r]) for sum_, (r, j) in zip(dots, places, strict=True)]
        factors = [splat(b, load(b, b.add(row(t.scales, t.scales_row, r), block), F32)) for r in range(rows)]
        at = b.mul(g, I64(4 * LANES * VECTORS))

        def column(base: ir.Value, j: int) -> ir.Value:
            return load(b, b.add(b.add(base, at), I64(4 * LANES * j)), vec(F32))

        scale = [column(t.scale, j) for j in range(VECTORS)]
        products = [b.fmul(factors[r], scale[j]) for r, j in places]
        floats = [b.sitofp(d, vec(F32)) for d in dots]
        sums = [fma(b, *operands) for operands in zip(floats, products, sums, strict=True)]
        if layout.has_minimum:
            minimum = [column(t.minimum, j) for j in range(VECTORS)]
            negative = [splat(b, b.sitofp(b.sub(I32(0), total), F32)) for total in totals]
            lowered = [b.fmul(factors[r], minimum[j]) for r, j in places]
            sums = [fma(b, negative[r], low, s) for (r, _), low, s in zip(places, lowered, sums, strict=True)]
        return sums

    sums = loop(b, I64(0), t.groups, 1, [constant(0.0)] * len(places), group)
    for (r, j), value in zip(places, sums, strict=True):
        store(b, value, b.add(row(t.out, t.out_row, r), I64(4 * LANES * j)))


def _tile(rows: int, layout: Layout, kind: str) -> Native:
    return Native(lambda b, *operands: _emit_tile(b, rows, layout, DOTS[kind], _Operands(*operands)), "i" * 12)


@cache
def tiles_of(layout: Layout) -> NativeGroup:
    """The tiles for a layout, in the order of TILE_ROWS. Raises MissingInstructions."""
    kind = dot_kind(machine_features())
    name = f"integers-{layout.bits}-{layout.offset}-{layout.group}-{int(layout.has_minimum)}-{kind}"
    return NativeGroup(name, {f"rows_{rows}": _tile(rows, layout, kind) for rows in TILE_ROWS})
