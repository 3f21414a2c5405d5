"""CPU: activations are quantised row by row, then panels of 32 outputs stream through tiles of a few rows."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import prange

from sempre.kernels.integers import BLOCK, IntegerPart, IntegerWeight
from sempre.kernels.integers.tiles import TILE_ROWS, tiles_of
from sempre.kernels.jit import address_of, compiled, compiled_twice, keep
from sempre.kernels.linear.cpu import add_partials
from sempre.kernels.linear.cpu_tiles import add_rows, copy_rows
from sempre.kernels.native import call_native
from sempre.kernels.vector_ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    address_intrinsic,
    constant,
    int_constant,
    llvm_rint,
    load,
    loop,
    splat,
    store,
    vec,
)

ROW_BLOCK = 240
PARALLEL_ELEMENTS = 16_384
LARGEST = 127.0
# the bits of infinity, and of a NaN
INFINITY, NAN = 0x7F80_0000, 0x7FC0_0000


def _emit_row(b: ir.IRBuilder, x: ir.Value, width: ir.Value, out: ir.Value, scales: ir.Value, totals: ir.Value) -> None:
    """Quantise a row of `width` elements to int8 at `out`, with a float32 scale for each block and the sums of each 16
    (int32)."""
    vectors = BLOCK // LANES

    def block(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        values = [load(b, b.add(x, b.mul(b.add(i, I64(LANES * v)), I64(4))), vec(F32)) for v in range(vectors)]
        magnitudes = [b.and_(b.bitcast(v, vec(I32)), int_constant(0x7FFF_FFFF)) for v in values]
        most = magnitudes[0]
        for m in magnitudes[1:]:
            # magnitudes are ordered as their bits are, and NaN is above all
            most = b.select(b.icmp_signed(">", m, most), m, most)
        most = _largest_lane(b, most)
        amax = b.bitcast(most, F32)
        is_finite = b.icmp_signed("<", most, I32(INFINITY))
        divided = b.fdiv(amax, ir.Constant(F32, LARGEST))
        scale = b.select(is_finite, divided, b.bitcast(I32(NAN), F32))
        store(b, scale, b.add(scales, b.mul(b.udiv(i, I64(BLOCK)), I64(4))))
        usable = b.and_(is_finite, b.fcmp_ordered(">", divided, ir.Constant(F32, 0.0)))
        divisor = splat(b, b.select(usable, divided, ir.Constant(F32, 1.0)))
        for v, value in enumerate(values):
            kept = b.select(splat(b, usable), value, constant(0.0))
            rounded = llvm_rint(b, b.fdiv(kept, divisor))
            # a divisor among the smallest floats is itself rounded, and may be too small
            rounded = b.select(b.fcmp_ordered(">", rounded, constant(LARGEST)), constant(LARGEST), rounded)
            rounded = b.select(b.fcmp_ordered("<", rounded, constant(-LARGEST)), constant(-LARGEST), rounded)
            whole = b.fptosi(rounded, vec(I32))
            at = b.add(i, I64(LANES * v))
            store(b, b.trunc(whole, vec(I8)), b.add(out, at))
            store(b, _lane_sum(b, whole), b.add(totals, b.mul(b.udiv(at, I64(LANES)), I64(4))))
        return carried

    loop(b, I64(0), width, BLOCK, [], block)


def _halves(b: ir.IRBuilder, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    lanes = value.type.count // 2
    undefined = ir.Constant(value.type, ir.Undefined)
    low, high = (list(range(start, start + lanes)) for start in (0, lanes))
    return tuple(b.shuffle_vector(value, undefined, ir.Constant(vec(I32, lanes), part)) for part in (low, high))


def _largest_lane(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    while value.type.count > 1:
        low, high = _halves(b, value)
        value = b.select(b.icmp_signed(">", high, low), high, low)
    return b.extract_element(value, I32(0))


def _lane_sum(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    while value.type.count > 1:
        value = b.add(*_halves(b, value))
    return b.extract_element(value, I32(0))


_row = address_intrinsic(_emit_row)


@compiled_twice
def _quantize(x: int, rows: int, width: int, out: int, scales: int, totals: int) -> None:
    for t in prange(rows):
        _row(x + t * width * 4, width, out + t * width, scales + t * width // 32 * 4, totals + t * width // 16 * 4)


@compiled()
def _tile_rows(
    tiles: int,
    x: int,
    scales: int,
    totals: int,
    rows: int,
    depth: int,
    row_depth: int,
    group: int,
    codes: int,
    scale: int,
    minimum: int,
    out: int,
    out_row: int,
) -> None:
    """Some rows by one panel; a row of x has `row_depth` inputs, of which `depth` are the panel's."""
    done, tile, groups, row_groups = 0, 0, depth // group, row_depth // group
    while done < rows:
        while TILE_ROWS[tile] > rows - done:
            tile += 1
        call_native(
            tiles,
            tile,
            x + done * row_depth,
            row_depth,
            scales + done * (row_depth // 32) * 4,
            row_depth // 32 * 4,
            totals + done * row_groups * 4,
            row_groups * 4,
            codes,
            scale,
            minimum,
            groups,
            out + done * out_row,
            out_row,
        )
        done += TILE_ROWS[tile]


@compiled(parallel=True)
def _integer_linear(
    tiles: int,
    x: int,
    scales: int,
    totals: int,
    rows: int,
    depth: int,
    row_depth: int,
    group: int,
    panel_bytes: int,
    codes: int,
    scale: int,
    minimum: int,
    columns: int,
    bias: int,
    out: int,
    out_row: int,
) -> None:
    num_panels = (columns + 31) // 32
    num_row_blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    groups = depth // group
    for unit in prange(num_row_blocks * num_panels):
        p, block = unit // num_row_blocks, unit % num_row_blocks
        first = block * ROW_BLOCK
        count = min(ROW_BLOCK, rows - first)
        width = min(32, columns - p * 32)
        out_at = out + first * out_row + p * 128
        minimum_at = minimum + p * groups * 128 if minimum != 0 else 0
        x_at, scales_at = x + first * row_depth, scales + first * (row_depth // 32) * 4
        totals_at = totals + first * (row_depth // group) * 4
        codes_at, scale_at = codes + p * panel_bytes, scale + p * groups * 128
        if width == 32:
            _tile_rows(
                tiles,
                x_at,
                scales_at,
                totals_at,
                count,
                depth,
                row_depth,
                group,
                codes_at,
                scale_at,
                minimum_at,
                out_at,
                out_row,
            )
        else:
            # the last, partial panel goes through scratch rows so that nothing is written past a row's end
            part = np.empty((count, 32), np.float32)
            place = address_of(part)
            _tile_rows(
                tiles,
                x_at,
                scales_at,
                totals_at,
                count,
                depth,
                row_depth,
                group,
                codes_at,
                scale_at,
                minimum_at,
                place,
                128,
            )
            copy_rows(place, 128, out_at, out_row, count, width)
            keep(part)
        if bias != 0:
            add_rows(bias + p * 128, 0, out_at, out_row, count, width)


class Quantized:
    """Rows of x as int8 [T, K], with `scales` float32 [T, B] and `totals` int32 [T, K / 16]."""

    def __init__(self, x: torch.Tensor) -> None:
        rows, width = x.shape
        self.values = torch.empty((rows, width), dtype=torch.int8, device="cpu")
        self.scales = torch.empty((rows, width // BLOCK), dtype=torch.float32, device="cpu")
        self.totals = torch.empty((rows, width // LANES), dtype=torch.int32, device="cpu")
        run = _quantize.parallel if x.numel() >= PARALLEL_ELEMENTS else _quantize.serial
        addresses = (part.data_ptr() for part in (self.values, self.scales, self.totals))
        run(x.data_ptr(), rows, width, *addresses)
        self._of_blocks: torch.Tensor | None = None

    def totals_of(self, group: int) -> torch.Tensor:
        """int32 [T, K / group]"""
        if group == LANES:
            return self.totals
        if self._of_blocks is None:
            self._of_blocks = self.totals[:, ::2] + self.totals[:, 1::2]
        return self._of_blocks


def integer_linear(x: torch.Tensor, w: IntegerWeight, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """See the facade; `bias` instead of the weight's."""
    quantized = Quantized(x)
    if w.leaves == 1:
        return _leaf(quantized, w, 0, bias, out)
    sums = torch.empty((w.leaves, *out.shape), dtype=torch.float32, device="cpu")
    for leaf in range(w.leaves):
        _leaf(quantized, w, leaf, None, sums[leaf])
    return add_partials(sums, None, bias, out)


def _leaf(x: Quantized, w: IntegerWeight, leaf: int, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """One leaf's sums, plus `bias`."""
    count, column = len(w.parts) // w.leaves, 0
    for part in w.parts[leaf * count : (leaf + 1) * count]:
        _run(x, part, leaf * (w.in_features // w.leaves), None if bias is None else bias[column:], out[:, column:])
        column += part.out_features
    return out


def _run(x: Quantized, part: IntegerPart, first: int, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """One part's outputs, of the inputs from `first` on, into the first columns of `out`."""
    rows, row_depth = x.values.shape
    group, panels = part.layout.group, part.scale.shape[0]
    depth = part.scale.shape[1] * group
    totals = x.totals_of(group)
    _integer_linear(
        tiles_of(part.layout).table,
        x.values.data_ptr() + first,
        x.scales.data_ptr() + first // BLOCK * 4,
        totals.data_ptr() + first // group * 4,
        rows,
        depth,
        row_depth,
        group,
        part.codes.nbytes // panels,
        part.codes.data_ptr(),
        part.scale.data_ptr(),
        0 if part.minimum is None else part.minimum.data_ptr(),
        part.out_features,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        4 * out.stride(0),
    )
