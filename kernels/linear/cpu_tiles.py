"""The register tiles of the CPU matmul, which compiled kernels call by their place in `TILES`, and small copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from sempre.kernels.native import Native, NativeGroup
from sempre.kernels.vector_ir import (
    ELEMENT_BYTES,
    F32,
    I64,
    LANES,
    address_intrinsic,
    constant,
    fma,
    load,
    load_widened,
    loop,
    splat,
    store,
    unrolled_loop,
    vec,
)

VECTORS = 2
PANEL = VECTORS * LANES
# terms of one chain: the rounding errors of a sum grow with the length of its chains
CHAIN = 64


@dataclass(frozen=True)
class _Operands:
    """Addresses and sizes; rows of x and out begin `x_row` and `out_row` bytes apart."""

    x: ir.Value
    x_row: ir.Value
    panel: ir.Value
    depth: ir.Value
    out: ir.Value
    out_row: ir.Value


def _tile(rows: int, dtype: str) -> Native:
    """Function (x, x_row, panel, depth, out, out_row): `rows` x 32 elements of a matmul.

    out[i, j] = sum over k ascending of x[i, k] * panel[k, j], in chains of `CHAIN` terms: one fused multiply-add per
    term, starting at 0, then one addition to the sum of the chains before. x and out are float32; the panel [depth, 32]
    holds elements of `dtype`.
    """
    return Native(lambda b, *operands: _emit_tile(b, rows, dtype, _Operands(*operands)), "iiiiii")


def _emit_tile(b: ir.IRBuilder, rows: int, dtype: str, tile: _Operands) -> None:
    width = LANES * ELEMENT_BYTES[dtype]
    x_rows, out_rows = [tile.x], [tile.out]
    for _ in range(rows - 1):
        x_rows.append(b.add(x_rows[-1], tile.x_row))
        out_rows.append(b.add(out_rows[-1], tile.out_row))

    places = [(i, j, b.add(out_rows[i], I64(64 * j))) for i in range(rows) for j in range(VECTORS)]

    def step(b: ir.IRBuilder, k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        at = b.add(tile.panel, b.mul(k, I64(VECTORS * width)))
        columns = [load_widened(b, b.add(at, I64(width * j)), dtype) for j in range(VECTORS)]
        factors = [splat(b, load(b, b.add(row, b.mul(k, I64(4))), F32)) for row in x_rows]
        return [fma(b, factors[i], columns[j], sums[i * VECTORS + j]) for i, j, _ in places]

    def chain(b: ir.IRBuilder, start: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        left = b.sub(tile.depth, start)
        length = b.select(b.icmp_signed("<", left, I64(CHAIN)), left, I64(CHAIN))
        sums = unrolled_loop(
            b, length, 4, [constant(0.0)] * len(places), lambda b, k, sums: step(b, b.add(start, k), sums)
        )
        with b.if_else(b.icmp_signed("==", start, I64(0))) as (first, later):
            with first:
                for total, (_, _, place) in zip(sums, places, strict=True):
                    store(b, total, place)
            with later:
                for total, (_, _, place) in zip(sums, places, strict=True):
                    store(b, b.fadd(load(b, place, vec(F32)), total), place)
        return carried

    loop(b, I64(0), tile.depth, CHAIN, [], chain)


def _rows_of_scalars(emit_element: Callable[[ir.IRBuilder, ir.Value, ir.Value], None]) -> Any:
    """Intrinsic (source, source_row, target, target_row, rows, columns): apply to each float32 of a small block."""

    def emit(
        b: ir.IRBuilder,
        source: ir.Value,
        source_row: ir.Value,
        target: ir.Value,
        target_row: ir.Value,
        rows: ir.Value,
        columns: ir.Value,
    ) -> None:
        def row(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            source_at, target_at = b.add(source, b.mul(i, source_row)), b.add(target, b.mul(i, target_row))

            def element(b: ir.IRBuilder, j: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                emit_element(b, b.add(source_at, b.mul(j, I64(4))), b.add(target_at, b.mul(j, I64(4))))
                return carried

            loop(b, I64(0), columns, 1, [], element)
            return carried

        loop(b, I64(0), rows, 1, [], row)

    return address_intrinsic(emit)


def _emit_copy(b: ir.IRBuilder, source: ir.Value, target: ir.Value) -> None:
    store(b, load(b, source, F32), target)


def _emit_add(b: ir.IRBuilder, source: ir.Value, target: ir.Value) -> None:
    store(b, b.fadd(load(b, target, F32), load(b, source, F32)), target)


def _emit_multiply(b: ir.IRBuilder, source: ir.Value, target: ir.Value) -> None:
    store(b, b.fmul(load(b, target, F32), load(b, source, F32)), target)


def _emit_scale_rows(
    b: ir.IRBuilder,
    scales: ir.Value,
    scale_row: ir.Value,
    target: ir.Value,
    target_row: ir.Value,
    rows: ir.Value,
    columns: ir.Value,
) -> None:
    """Multiply row i of a small float32 block by the scale at `scales` + i * `scale_row` bytes."""

    def row(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        scale = load(b, b.add(scales, b.mul(i, scale_row)), F32)
        start = b.add(target, b.mul(i, target_row))

        def element(b: ir.IRBuilder, j: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            at = b.add(start, b.mul(j, I64(4)))
            store(b, b.fmul(load(b, at, F32), scale), at)
            return carried

        loop(b, I64(0), columns, 1, [], element)
        return carried

    loop(b, I64(0), rows, 1, [], row)


def _emit_add_panels(
    b: ir.IRBuilder, source: ir.Value, source_row: ir.Value, target: ir.Value, target_row: ir.Value, rows: ir.Value
) -> None:
    """Add rows of a panel, PANEL float32 each, to other rows."""

    def row(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        source_at, target_at = b.add(source, b.mul(i, source_row)), b.add(target, b.mul(i, target_row))
        for vector in range(VECTORS):
            offset = I64(vector * LANES * 4)
            place = b.add(target_at, offset)
            store(b, b.fadd(load(b, place, vec(F32)), load(b, b.add(source_at, offset), vec(F32))), place)
        return carried

    loop(b, I64(0), rows, 1, [], row)


TILE_ROWS = (12, 8, 4, 2, 1)
# a group for each dtype of `kernels.dtypes`, by its code; in a group, a tile for each number of rows
TILES = [
    NativeGroup(f"linear.{dtype}", {f"tile_{rows}": _tile(rows, dtype) for rows in TILE_ROWS})
    for dtype in ELEMENT_BYTES
]
copy_rows, add_rows, multiply_rows = (_rows_of_scalars(emit) for emit in (_emit_copy, _emit_add, _emit_multiply))
scale_rows = address_intrinsic(_emit_scale_rows)
add_panels = address_intrinsic(_emit_add_panels)
