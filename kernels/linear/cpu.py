"""CPU: register tiles of up to 12 rows by 32 columns over weights packed in panels of 32 columns.

# T rows of x, K in features, N out features, P = ceil(N / 32) panels
A panel [K, 32] is contiguous, so a decode step streams each weight once, in order. From WIDEN_ROWS rows on, a 16-bit or
fp8 panel is first widened into scratch memory: the same bits, without widening in the inner loop. An fp8 weight's sums
are multiplied by the scale of their row of x, if that was quantised, then by their column's. Where x is rounded to
bfloat16 too, a pair of elements takes the place of one of float32 (`cpu_pairs`).

Where K has leaves, a unit of work computes them one after the other and adds two neighbouring sums as soon as both are
there, as a carry runs through a binary counter: at most log2(leaves) sums wait at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from sempre.kernels.dtypes import CODES, ELEMENT_SIZE, FP8_CODE, dtype_code, widen
from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.linear import cpu_pairs
from sempre.kernels.linear.cpu_tiles import (
    PANEL,
    TILE_ROWS,
    TILES,
    add_panels,
    add_rows,
    copy_rows,
    multiply_rows,
    scale_rows,
)
from sempre.kernels.linear.weights import CpuLinearWeight
from sempre.kernels.native import call_native

ROW_BLOCK = 240  # rows of x that stay in the L2 cache while panels stream through
WIDEN_ROWS = 24
PARALLEL_ELEMENTS = 65_536  # of x to round: below, starting the threads costs more than they save
FLOAT32_CODE = CODES[torch.float32]


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, leaves: int = 1) -> CpuLinearWeight:
    """Pack `weight` [N, K] (float32, bfloat16 or float16, kept as stored) and `bias` [N]."""
    out_features, in_features = weight.shape
    dtype = dtype_code(weight.dtype)
    return CpuLinearWeight(to_panels(weight), _vector(bias), in_features, out_features, dtype, leaves=leaves)


def pack_bfloat16_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, leaves: int = 1) -> CpuLinearWeight:
    """Pack the bfloat16 `weight` [N, K] in pairs, and `bias` [N]."""
    out_features, in_features = weight.shape
    panels = to_panels(cpu_pairs.pairs_of(weight))
    dtype = CODES[torch.bfloat16]
    return CpuLinearWeight(panels, _vector(bias), in_features, out_features, dtype, leaves=leaves, rounds_x=True)


def pack_fp8_linear(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scheme: Fp8Scheme, leaves: int = 1
) -> CpuLinearWeight:
    """Pack the fp8 `weight` [N, K], `scale` [N] and `bias` [N]."""
    out_features, in_features = weight.shape
    panels = to_panels(weight.view(torch.uint8)).view(weight.dtype)
    return CpuLinearWeight(
        panels, _vector(bias), in_features, out_features, FP8_CODE, _vector(scale), scheme, leaves=leaves
    )


def to_panels(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] as panels [P, K, 32]; columns past N are zero."""
    out_features, in_features = weight.shape
    num_panels = -(-out_features // PANEL)
    if out_features % PANEL:
        padded = weight.new_zeros((num_panels * PANEL, in_features))
        padded[:out_features] = weight
        weight = padded
    return weight.view(num_panels, PANEL, in_features).transpose(1, 2).contiguous()


def _vector(values: torch.Tensor | None) -> torch.Tensor | None:
    return values.float().contiguous() if values is not None else None


def address(values: torch.Tensor | None) -> int:
    return values.data_ptr() if values is not None else 0


def linear(x: torch.Tensor, w: CpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    return _run(x, w, out, address(w.scale), address(w.bias))


def partial_linear(x: torch.Tensor, w: CpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    return _run(x, w, out, 0, 0)


def _run(x: torch.Tensor, w: CpuLinearWeight, out: torch.Tensor, scale: int, bias: int) -> torch.Tensor:
    """`scale` and `bias` are addresses; 0: none."""
    row_scales, rows = None, x.shape[0]
    if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        # each leaf of a row has a scale of its own
        x, row_scales = quantize_rows(x.view(rows * w.leaves, w.in_features // w.leaves))
    tiles, wide_tiles, dtype = tiles_of(w, rows)
    _linear(
        tiles,
        wide_tiles,
        x.data_ptr(),
        w.rounds_x,
        rows,
        w.in_features,
        w.leaves,
        w.panels.data_ptr(),
        dtype,
        w.out_features,
        address(row_scales),
        scale,
        bias,
        out.data_ptr(),
    )
    return out


def tiles_of(w: CpuLinearWeight, rows: int) -> tuple[int, int, int]:
    """The table of tiles for a weight's panels, that for panels once widened, and the code of the panels' dtype, for
    at most so many rows."""
    if w.rounds_x:
        # a pair is as large as an element of float32, and never widened
        return cpu_pairs.TILES.table, 0, FLOAT32_CODE
    # those of float32 are compiled when a step first has enough rows
    return TILES[w.dtype_code].table, TILES[FLOAT32_CODE].table if rows >= WIDEN_ROWS else 0, w.dtype_code


def sum_partials(partials: torch.Tensor, w: CpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    return add_partials(partials, w.scale, w.bias, out)


def add_partials(
    partials: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """Add `partials` [R, T, N] as a balanced binary tree, times the scales of channels, plus the bias, into `out`."""
    ranks, rows, columns = partials.shape
    _sum_partials(partials.data_ptr(), ranks, rows, columns, address(scale), address(bias), out.data_ptr())
    return out


@compiled()
def multiply_panel(tiles: int, x: int, x_row: int, rows: int, depth: int, panel: int, out: int, out_row: int) -> None:
    """Rows of x, `x_row` bytes apart, by one panel [depth, 32]; rows of out are `out_row` bytes apart. `tiles` is the
    table of the panel's dtype."""
    done, tile = 0, 0
    while done < rows:
        while TILE_ROWS[tile] > rows - done:
            tile += 1
        call_native(tiles, tile, x + done * x_row, x_row, panel, depth, out + done * out_row, out_row)
        done += TILE_ROWS[tile]


@compiled()
def panel_rows(
    tiles: int,
    wide_tiles: int,
    x: int,
    x_row: int,
    rows: int,
    depth: int,
    panel: int,
    dtype: int,
    out: int,
    out_row: int,
) -> None:
    if dtype != 0 and rows >= WIDEN_ROWS:
        scratch = np.empty(depth * PANEL, np.float32)
        wide = address_of(scratch)
        widen(panel, wide, depth * PANEL, dtype)
        multiply_panel(wide_tiles, x, x_row, rows, depth, wide, out, out_row)
        keep(scratch)
    else:
        multiply_panel(tiles, x, x_row, rows, depth, panel, out, out_row)


@compiled()
def _leaf_rows(
    tiles: int,
    wide_tiles: int,
    x: int,
    rows: int,
    depth: int,
    leaves: int,
    panel: int,
    dtype: int,
    row_scales: int,
    out: int,
    out_row: int,
) -> None:
    """The sum over the tree of leaves; `row_scales` [rows, leaves], 0: none."""
    leaf_depth = depth // leaves
    panel_bytes = leaf_depth * PANEL * ELEMENT_SIZE[dtype]
    level_bytes = rows * PANEL * 4
    levels = 0
    while (1 << levels) < leaves:
        levels += 1
    waiting = np.empty(levels * rows * PANEL, np.float32)
    # sum s waits in `out` for s = 0, in level s - 1 of the scratch memory after that
    scratch = address_of(waiting) - level_bytes
    for leaf in range(leaves):
        count = 0
        bits = leaf
        while bits:
            count += bits & 1
            bits >>= 1
        place, row = (out, out_row) if count == 0 else (scratch + count * level_bytes, PANEL * 4)
        x_at, panel_at = x + leaf * leaf_depth * 4, panel + leaf * panel_bytes
        panel_rows(tiles, wide_tiles, x_at, depth * 4, rows, leaf_depth, panel_at, dtype, place, row)
        if row_scales != 0:
            scale_rows(row_scales + leaf * 4, leaves * 4, place, row, rows, PANEL)
        bits = leaf
        while bits & 1:
            count -= 1
            place_before, row_before = (out, out_row) if count == 0 else (scratch + count * level_bytes, PANEL * 4)
            add_panels(place, row, place_before, row_before, rows)
            place, row = place_before, row_before
            bits >>= 1
    keep(waiting)


@compiled()
def _unit(
    tiles: int,
    wide_tiles: int,
    x: int,
    rows: int,
    depth: int,
    leaves: int,
    panel: int,
    dtype: int,
    row_scales: int,
    out: int,
    out_row: int,
) -> None:
    """Sums of `rows` rows by PANEL columns."""
    if leaves > 1:
        _leaf_rows(tiles, wide_tiles, x, rows, depth, leaves, panel, dtype, row_scales, out, out_row)
        return
    panel_rows(tiles, wide_tiles, x, depth * 4, rows, depth, panel, dtype, out, out_row)
    if row_scales != 0:
        scale_rows(row_scales, 4, out, out_row, rows, PANEL)


@compiled(parallel=True)
def _linear(
    tiles: int,
    wide_tiles: int,
    x: int,
    rounds_x: bool,
    rows: int,
    depth: int,
    leaves: int,
    panels: int,
    dtype: int,
    columns: int,
    row_scales: int,
    scale: int,
    bias: int,
    out: int,
) -> None:
    words = np.empty(rows * ((depth + 1) // 2) if rounds_x else 0, np.int32)
    if rounds_x:
        words_at, row_bytes, pairs = address_of(words), depth * 4, (depth + 1) // 2
        if rows * depth >= PARALLEL_ELEMENTS:
            for t in prange(rows):
                call_native(tiles, cpu_pairs.ROUND_ROW, x + t * row_bytes, row_bytes // 4, words_at + t * pairs * 4)
        else:
            for t in range(rows):
                call_native(tiles, cpu_pairs.ROUND_ROW, x + t * row_bytes, row_bytes // 4, words_at + t * pairs * 4)
        x, depth = words_at, pairs
    num_panels = (columns + PANEL - 1) // PANEL
    num_row_blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    panel_bytes = depth * PANEL * ELEMENT_SIZE[dtype]
    for unit in prange(num_row_blocks * num_panels):
        p, block = unit // num_row_blocks, unit % num_row_blocks
        first_row = block * ROW_BLOCK
        block_rows = min(ROW_BLOCK, rows - first_row)
        x_at = x + first_row * depth * 4
        out_at = out + (first_row * columns + p * PANEL) * 4
        scales_at = row_scales + first_row * leaves * 4 if row_scales != 0 else 0
        panel = panels + p * panel_bytes
        width = min(PANEL, columns - p * PANEL)
        if width == PANEL:
            _unit(tiles, wide_tiles, x_at, block_rows, depth, leaves, panel, dtype, scales_at, out_at, columns * 4)
        else:
            # the last, partial panel goes through scratch rows so that nothing is written past a row's end
            part = np.empty((block_rows, PANEL), np.float32)
            _unit(
                tiles, wide_tiles, x_at, block_rows, depth, leaves, panel, dtype, scales_at, address_of(part), PANEL * 4
            )
            copy_rows(address_of(part), PANEL * 4, out_at, columns * 4, block_rows, width)
            keep(part)
        finish_rows(scale, bias, p * PANEL, out_at, columns * 4, block_rows, width)
    keep(words)


@compiled()
def finish_rows(scale: int, bias: int, first_column: int, out: int, out_row: int, rows: int, width: int) -> None:
    """Times the scales of some columns, plus their biases; addresses of 0: none."""
    if scale != 0:
        multiply_rows(scale + first_column * 4, 0, out, out_row, rows, width)
    if bias != 0:
        add_rows(bias + first_column * 4, 0, out, out_row, rows, width)


@compiled(parallel=True)
def _sum_partials(partials: int, ranks: int, rows: int, columns: int, scale: int, bias: int, out: int) -> None:
    row_bytes = columns * 4
    for t in prange(rows):
        sums = np.empty(ranks * columns, np.float32)
        for rank in range(ranks):
            copy_rows(partials + (rank * rows + t) * row_bytes, 0, address_of(sums) + rank * row_bytes, 0, 1, columns)
        distance = 1
        while distance < ranks:
            for left in range(0, ranks, 2 * distance):
                at = address_of(sums) + left * row_bytes
                add_rows(at + distance * row_bytes, 0, at, 0, 1, columns)
            distance *= 2
        copy_rows(address_of(sums), 0, out + t * row_bytes, 0, 1, columns)
        keep(sums)
        finish_rows(scale, bias, 0, out + t * row_bytes, 0, 1, columns)
