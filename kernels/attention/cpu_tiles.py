"""The register tiles of the CPU attention: scores, online softmax and weighted values for one tile of 64 keys.

Compiled kernels call them by their place in `TILES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from sempre.kernels.native import Native, NativeGroup
from sempre.kernels.vector_ir import (
    F32,
    I32,
    I64,
    LANES,
    constant,
    exp,
    fma,
    load,
    loop,
    splat,
    store,
    tree_max,
    tree_sum,
    unrolled_loop,
    vec,
)

BLOCKS = 4  # of 16 keys each
TILE_ROW_BYTES = BLOCKS * LANES * 4
NEGATIVE_INFINITY = float("-inf")


def _qk(rows: int) -> Native:
    """Function (q, q_row_bytes, k0…k3, dim, scores): rows x 64 dot products over ascending dimensions.

    k0…k3 are the addresses of four transposed key blocks [dim, 16], float32.
    """

    def emit(b: ir.IRBuilder, q: ir.Value, q_row: ir.Value, *rest: ir.Value) -> None:
        *blocks, dim, scores = rest
        q_rows = [b.add(q, b.mul(q_row, I64(i))) for i in range(rows)]

        def step(b: ir.IRBuilder, d: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            shift = b.mul(d, I64(64))
            keys = [load(b, b.add(block, shift), vec(F32)) for block in blocks]
            following = []
            for i in range(rows):
                factor = splat(b, load(b, b.add(q_rows[i], b.mul(d, I64(4))), F32))
                following += [fma(b, factor, keys[j], sums[i * BLOCKS + j]) for j in range(BLOCKS)]
            return following

        sums = unrolled_loop(b, dim, 4, [constant(0.0)] * (rows * BLOCKS), step)
        for i in range(rows):
            for j in range(BLOCKS):
                store(b, sums[i * BLOCKS + j], b.add(scores, I64(i * TILE_ROW_BYTES + j * 64)))

    return Native(emit, "iiiiiiii")


def _pv(rows: int) -> Native:
    """Function (p, v0…v3, first, past, dim, acc): acc[i] += p[i, j] * v[j] for the keys [first, past), ascending.

    v0…v3 are four value blocks [16, dim] and acc [rows, dim], float32; other keys of the tile are not read.
    """

    def emit(b: ir.IRBuilder, p: ir.Value, *rest: ir.Value) -> None:
        *blocks, first, past, dim, acc = rest

        def columns(vectors: int) -> Callable[[ir.IRBuilder, ir.Value, list[ir.Value]], list[ir.Value]]:
            def body(b: ir.IRBuilder, column: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                shift = b.mul(column, I64(4))
                values = _Values([b.add(block, shift) for block in blocks], b.mul(dim, I64(4)), first, past)
                _emit_pv_columns(b, rows, vectors, p, values, b.add(acc, shift))
                return carried

            return body

        wide = b.and_(dim, I64(-64))
        loop(b, I64(0), wide, 4 * LANES, [], columns(4))
        loop(b, wide, dim, LANES, [], columns(1))

    return Native(emit, "iiiiiiiii")


@dataclass(frozen=True)
class _Values:
    """Columns of a tile's values, of which the keys [first, past) are read; rows are `row_bytes` apart."""

    blocks: list[ir.Value]
    row_bytes: ir.Value
    first: ir.Value
    past: ir.Value


def _emit_pv_columns(b: ir.IRBuilder, rows: int, vectors: int, p: ir.Value, tile: _Values, acc: ir.Value) -> None:
    acc_rows = [b.add(acc, b.mul(tile.row_bytes, I64(i))) for i in range(rows)]
    sums = [load(b, b.add(acc_rows[i], I64(64 * n)), vec(F32)) for i in range(rows) for n in range(vectors)]
    for number, block in enumerate(tile.blocks):
        p_block = b.add(p, I64(number * 64))
        start, stop = (_within_block(b, b.sub(key, I64(number * LANES))) for key in (tile.first, tile.past))

        def step(
            b: ir.IRBuilder, j: ir.Value, sums: list[ir.Value], block: ir.Value = block, p_block: ir.Value = p_block
        ) -> list[ir.Value]:
            row = b.add(block, b.mul(j, tile.row_bytes))
            values = [load(b, b.add(row, I64(64 * n)), vec(F32)) for n in range(vectors)]
            following = []
            for i in range(rows):
                at = b.add(p_block, b.add(I64(i * TILE_ROW_BYTES), b.mul(j, I64(4))))
                factor = splat(b, load(b, at, F32))
                following += [fma(b, factor, values[n], sums[i * vectors + n]) for n in range(vectors)]
            return following

        sums = loop(b, start, stop, 1, sums, step)
    for i in range(rows):
        for n in range(vectors):
            store(b, sums[i * vectors + n], b.add(acc_rows[i], I64(64 * n)))


def _within_block(b: ir.IRBuilder, key: ir.Value) -> ir.Value:
    """`key` clamped to [0, LANES]."""
    key = b.select(b.icmp_signed(">", key, I64(LANES)), I64(LANES), key)
    return b.select(b.icmp_signed("<", key, I64(0)), I64(0), key)


def _emit_softmax_row(
    b: ir.IRBuilder, scores: ir.Value, low: ir.Value, high: ir.Value, scale: ir.Value, state: ir.Value
) -> ir.Value:
    """Scores of one row and tile -> weights, in place; update (max, sum) at `state`.

    Keys outside [low, high) of the tile are masked. Returns the factor for the weights of earlier tiles.
    """
    scales = splat(b, scale)
    first, past = splat(b, b.trunc(low, I32)), splat(b, b.trunc(high, I32))
    masked = []
    for j in range(BLOCKS):
        index = ir.Constant(vec(I32), [j * LANES + lane for lane in range(LANES)])
        seen = b.and_(b.icmp_signed(">=", index, first), b.icmp_signed("<", index, past))
        score = b.fmul(load(b, b.add(scores, I64(j * 64)), vec(F32)), scales)
        masked.append(b.select(seen, score, constant(NEGATIVE_INFINITY)))

    def larger(x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", y, x), y, x)

    tile_max = tree_max(b, larger(larger(masked[0], masked[1]), larger(masked[2], masked[3])))
    old_max, old_sum = load(b, state, F32), load(b, b.add(state, I64(4)), F32)
    new_max = b.select(b.fcmp_ordered(">", tile_max, old_max), tile_max, old_max)
    shift = splat(b, new_max)
    weights = [exp(b, b.fsub(score, shift)) for score in masked]
    for j in range(BLOCKS):
        store(b, weights[j], b.add(scores, I64(j * 64)))
    tile_sum = tree_sum(b, b.fadd(b.fadd(weights[0], weights[1]), b.fadd(weights[2], weights[3])))
    correction = exp(b, b.fsub(splat(b, old_max), shift))
    factor = b.extract_element(correction, I32(0))
    rescaled = b.fmul(old_sum, factor)
    store(b, new_max, state)
    store(b, b.fadd(rescaled, tile_sum), b.add(state, I64(4)))
    return factor


def _emit_multiply_row(b: ir.IRBuilder, acc: ir.Value, factor: ir.Value, dim: ir.Value) -> None:
    """acc *= factor"""
    factors = splat(b, factor)

    def body(b: ir.IRBuilder, d: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        at = b.add(acc, b.mul(d, I64(4)))
        store(b, b.fmul(load(b, at, vec(F32)), factors), at)
        return carried

    loop(b, I64(0), dim, LANES, [], body)


def _emit_divide_row(b: ir.IRBuilder, acc: ir.Value, total: ir.Value, out: ir.Value, dim: ir.Value) -> None:
    """out = acc / total, where `total` is the address of the row's sum."""
    divisor = splat(b, load(b, total, F32))

    def body(b: ir.IRBuilder, d: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(d, I64(4))
        store(b, b.fdiv(load(b, b.add(acc, offset), vec(F32)), divisor), b.add(out, offset))
        return carried

    loop(b, I64(0), dim, LANES, [], body)


def _emit_copy_row(b: ir.IRBuilder, source: ir.Value, target: ir.Value, dim: ir.Value) -> None:
    def body(b: ir.IRBuilder, d: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(d, I64(4))
        store(b, load(b, b.add(source, offset), vec(F32)), b.add(target, offset))
        return carried

    loop(b, I64(0), dim, LANES, [], body)


MOST_ROWS = 4  # of a tile
# places in TILES; the first is that of tiles with one row
QK, PV, SOFTMAX_ROW, MULTIPLY_ROW, DIVIDE_ROW, COPY_ROW = 0, MOST_ROWS, *range(2 * MOST_ROWS, 2 * MOST_ROWS + 4)
TILES = NativeGroup(
    "attention",
    {
        **{f"qk_{rows}": _qk(rows) for rows in range(1, MOST_ROWS + 1)},
        **{f"pv_{rows}": _pv(rows) for rows in range(1, MOST_ROWS + 1)},
        "softmax_row": Native(_emit_softmax_row, "iiifi", returns_float=True),
        "multiply_row": Native(_emit_multiply_row, "ifi"),
        "divide_row": Native(_emit_divide_row, "iiii"),
        "copy_row": Native(_emit_copy_row, "iii"),
    },
)
