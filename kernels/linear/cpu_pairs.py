"""The tiles of a matmul whose inputs are bfloat16 on both sides, two terms at a time.

# T rows of x, K in features, H = ceil(K / 2) pairs
A pair is one word of 32 bits: the element of the even k in its upper half, that of the odd k in its lower half. So the
instruction VDPBF16PS, which adds the product of the upper halves first, goes through k in ascending order. Both halves
are fused multiply-adds that read subnormal numbers as zero and flush a subnormal result to zero; other CPUs take the
same two steps, with the control register of their floating-point unit set to do so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from sempre.kernels.float_state import IS_ARM, IS_X86
from sempre.kernels.linear.cpu_tiles import PANEL, TILE_ROWS, VECTORS
from sempre.kernels.native import Native, NativeGroup
from sempre.kernels.vector_ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    bfloat16_bits,
    constant,
    fma,
    int_constant,
    load,
    loop,
    splat,
    store,
    unrolled_loop,
    vec,
)

_UPPER = -0x10000  # the upper half of a word
_WORD_BYTES = 4
_PAIRS = LANES // 2
# tiles of so many rows compute long enough for the next panel to arrive meanwhile; with fewer the memory is all that
# counts, and reads ahead by itself
_PREFETCHING_ROWS = 4
# MXCSR and FPCR: to nearest, nothing trapped, subnormal inputs and results are zero
_FLUSHING_MXCSR, _FLUSHING_FPCR = 0x9FC0, 1 << 24


# (builder, words of x, words of a column, sums) -> sums
_AddPairs = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]


@dataclass(frozen=True)
class _Operands:
    """Addresses and sizes; rows of x and out begin `x_row` and `out_row` bytes apart, `depth` is in pairs."""

    x: ir.Value
    x_row: ir.Value
    panel: ir.Value
    depth: ir.Value
    out: ir.Value
    out_row: ir.Value


def pair_tiles(*, has_instruction: bool) -> NativeGroup:
    """A tile for each of `TILE_ROWS`, then `ROUND_ROW`. Both kinds give equal bits."""

    def tile(rows: int) -> Native:
        """Function (x, x_row, panel, depth, out, out_row): `rows` x 32 sums over the pairs, one chain each from 0."""
        emit = _emit_tile if has_instruction else _emit_flushing_tile
        return Native(lambda b, *operands: emit(b, rows, _Operands(*operands)), "iiiiii")

    functions = {f"tile_{rows}": tile(rows) for rows in TILE_ROWS}
    functions["round_row"] = Native(_emit_round_row, "iii")
    return NativeGroup(f"linear.pairs.{'instruction' if has_instruction else 'emulated'}", functions)


def _emit_tile(b: ir.IRBuilder, rows: int, tile: _Operands) -> None:
    """With VDPBF16PS."""
    kind = ir.FunctionType(vec(F32), [vec(F32), vec(F32), vec(F32)])

    def add_pairs(b: ir.IRBuilder, x: ir.Value, column: ir.Value, total: ir.Value) -> ir.Value:
        x, column = (b.bitcast(words, vec(F32)) for words in (x, column))
        return b.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, x, column], side_effect=False)

    _emit_sums(b, rows, tile, add_pairs)


def _emit_flushing_tile(b: ir.IRBuilder, rows: int, tile: _Operands) -> None:
    """With two fused multiply-adds."""

    def halves(b: ir.IRBuilder, words: ir.Value) -> list[ir.Value]:
        upper, lower = b.and_(words, int_constant(_UPPER)), b.shl(words, int_constant(16))
        return [b.bitcast(half, vec(F32)) for half in (upper, lower)]

    def add_pairs(b: ir.IRBuilder, x: ir.Value, column: ir.Value, total: ir.Value) -> ir.Value:
        for one, other in zip(halves(b, x), halves(b, column), strict=True):
            total = fma(b, one, other, total)
        return total

    before = _begin_flushing(b)
    _emit_sums(b, rows, tile, add_pairs)
    _end_flushing(b, before)


def _emit_sums(b: ir.IRBuilder, rows: int, tile: _Operands, add_pairs: _AddPairs) -> None:
    x_rows, out_rows = [tile.x], [tile.out]
    for _ in range(rows - 1):
        x_rows.append(b.add(x_rows[-1], tile.x_row))
        out_rows.append(b.add(out_rows[-1], tile.out_row))
    panel_bytes = b.mul(tile.depth, I64(PANEL * _WORD_BYTES))
    places = [(i, j) for i in range(rows) for j in range(VECTORS)]

    def step(b: ir.IRBuilder, k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        at = b.add(tile.panel, b.mul(k, I64(PANEL * _WORD_BYTES)))
        places_of_columns = [b.add(at, I64(LANES * _WORD_BYTES * j)) for j in range(VECTORS)]
        columns = [load(b, place, vec(I32)) for place in places_of_columns]
        if rows >= _PREFETCHING_ROWS:
            for place in places_of_columns:
                _prefetch(b, b.add(place, panel_bytes))
        following = []
        for i, row in enumerate(x_rows):
            # one at a time: all of them together would not fit in the registers
            factor = splat(b, load(b, b.add(row, b.mul(k, I64(_WORD_BYTES))), I32))
            following += [add_pairs(b, factor, columns[j], sums[i * VECTORS + j]) for j in range(VECTORS)]
        return following

    sums = unrolled_loop(b, tile.depth, 4, [constant(0.0)] * len(places), step)
    for (i, j), total in zip(places, sums, strict=True):
        store(b, total, b.add(out_rows[i], I64(4 * LANES * j)))


def _emit_round_row(b: ir.IRBuilder, x: ir.Value, count: ir.Value, out: ir.Value) -> None:
    """Words [ceil(count / 2)] of a float32 row, rounded to nearest, ties to even; NaN stays NaN. An odd count is
    followed by a zero."""

    def several(b: ir.IRBuilder, k: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        bits = bfloat16_bits(b, load(b, b.add(x, b.mul(k, I64(4))), vec(F32)))
        both = b.bitcast(bits, vec(I64, _PAIRS))
        upper = b.and_(both, ir.Constant(both.type, [_UPPER & 0xFFFFFFFF] * _PAIRS))
        lower = b.lshr(both, ir.Constant(both.type, [48] * _PAIRS))
        store(b, b.trunc(b.or_(upper, lower), vec(I32, _PAIRS)), b.add(out, b.mul(k, I64(2))))
        return carried

    def rounded(b: ir.IRBuilder, k: ir.Value) -> ir.Value:
        bits = bfloat16_bits(b, splat(b, load(b, b.add(x, b.mul(k, I64(4))), F32)))
        return b.extract_element(bits, I32(0))

    def one(b: ir.IRBuilder, k: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        upper = b.and_(rounded(b, k), I32(_UPPER))
        at = b.add(out, b.mul(k, I64(2)))
        store(b, upper, at)
        following = b.add(k, I64(1))
        with b.if_then(b.icmp_signed("<", following, count)):
            store(b, b.or_(upper, b.lshr(rounded(b, following), I32(16))), at)
        return carried

    whole = b.and_(count, I64(-LANES))
    loop(b, I64(0), whole, LANES, [], several)
    loop(b, whole, count, 2, [], one)


def _prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Have a line of the next panel brought into the L2 cache; after the last panel it is ignored."""
    if IS_X86:
        kind = ir.FunctionType(ir.VoidType(), [I64])
        b.asm(kind, "prefetcht1 ($0)", "r", [address], side_effect=True)


def _begin_flushing(b: ir.IRBuilder) -> ir.Value:
    """Subnormal inputs and results become zero from here on; what `_end_flushing` needs."""
    if IS_X86:
        before = cgutils.alloca_once(b, I32)
        _mxcsr(b, "stmxcsr", before)
        _mxcsr(b, "ldmxcsr", cgutils.alloca_once_value(b, I32(_FLUSHING_MXCSR)))
        return before
    if IS_ARM:
        before = b.asm(ir.FunctionType(I64, []), "mrs $0, fpcr", "=r", [], side_effect=True)
        _set_fpcr(b, I64(_FLUSHING_FPCR))
        return before
    raise NotImplementedError("bfloat16 matmuls are computed on x86-64 and ARM64 only; use dtype float32")


def _end_flushing(b: ir.IRBuilder, before: ir.Value) -> None:
    if IS_X86:
        _mxcsr(b, "ldmxcsr", before)
    else:
        _set_fpcr(b, before)


def _mxcsr(b: ir.IRBuilder, operation: str, word: ir.Value) -> None:
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer])
    b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.sse.{operation}"), [b.bitcast(word, pointer)])


def _set_fpcr(b: ir.IRBuilder, value: ir.Value) -> None:
    b.asm(ir.FunctionType(ir.VoidType(), [I64]), "msr fpcr, $0", "r", [value], side_effect=True)


ROUND_ROW = len(TILE_ROWS)
TILES = pair_tiles(has_instruction="+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2].split(","))


def pairs_of(weight: torch.Tensor) -> torch.Tensor:
    """Words int32 [N, H] of a bfloat16 weight [N, K]."""
    if weight.shape[1] % 2:
        weight = torch.nn.functional.pad(weight, (0, 1))
    # memory is little-endian: the lower half comes first
    swapped = weight.view(weight.shape[0], -1, 2).flip(2).contiguous()
    return swapped.view(torch.int32).squeeze(2)
