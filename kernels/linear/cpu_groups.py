"""CPU: a matmul whose rows have weights of their own, several of one shape, such as those of experts.

# G weights, P rows, K in features, N out features
The sums are those of `linear` with each row's weight, in its tiles. The rows of one weight are adjacent, so that a
panel streams once for all of them. Each thread takes as much of the panels of all weights as another, by their rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange

from sempre.kernels.dtypes import ELEMENT_SIZE
from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.linear import cpu_pairs
from sempre.kernels.linear.cpu import ROW_BLOCK, address, finish_rows, panel_rows, tiles_of
from sempre.kernels.linear.cpu_tiles import PANEL, copy_rows, scale_rows
from sempre.kernels.linear.weights import CpuLinearWeight, GroupRows, WeightGroup
from sempre.kernels.native import call_native
from sempre.kernels.threads import get_num_threads

# reading a panel from memory takes about as long as computing so many rows with it
_READING_ROWS = 4
_NO_SCALES = np.empty(0, np.float32)


def group_weights(weights: Sequence[object]) -> WeightGroup | None:
    """None unless they are weights of one kind, whose K is summed in one piece."""
    alike = [w for w in weights if isinstance(w, CpuLinearWeight) and w.leaves == 1]
    if len(alike) < len(weights) or len({_kind(w) for w in alike}) != 1:
        return None
    parts = ([w.panels for w in alike], [w.scale for w in alike], [w.bias for w in alike])
    return WeightGroup(tuple(alike), *(np.asarray([address(t) for t in part], np.int64) for part in parts))


def _kind(w: CpuLinearWeight) -> tuple[object, ...]:
    return w.in_features, w.out_features, w.dtype_code, w.scheme, w.rounds_x


def group_linear(x: torch.Tensor, group: WeightGroup, rows: GroupRows, out: torch.Tensor) -> torch.Tensor:
    """Row `x_rows[p]` of x [T, K] times the weight of p, into row `out_rows[p]` of out [R, N]; returns `out`, whose
    other rows are as they were. Both float32 and contiguous."""
    w = group.weights[0]
    scales = _NO_SCALES
    if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        x, row_scales = quantize_rows(x)
        scales = row_scales.numpy()
    tiles, wide_tiles, dtype = tiles_of(w, len(rows.x_rows))
    _group_linear(
        (tiles, wide_tiles, w.rounds_x, dtype),
        x.numpy(),
        scales.reshape(-1),
        (group.panels, group.scales, group.biases),
        rows.starts,
        rows.x_rows,
        rows.out_rows,
        out.numpy(),
        get_num_threads(),
    )
    return out


@compiled(parallel=True)
def _group_linear(
    kernels: tuple[int, int, bool, int],
    x: np.ndarray,
    row_scales: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray, np.ndarray],
    starts: np.ndarray,
    x_rows: np.ndarray,
    out_rows: np.ndarray,
    out: np.ndarray,
    num_threads: int,
) -> None:
    tiles, _, rounds_x, _ = kernels
    count, depth, columns = starts[-1], x.shape[1], out.shape[1]
    words = (depth + 1) // 2 if rounds_x else depth
    # of 32 bits, whatever they hold
    gathered = np.empty((count, words), np.float32)
    scales = np.empty(count if row_scales.size else 0, np.float32)
    num_panels = (columns + PANEL - 1) // PANEL
    for p in prange(count):
        row = x_rows[p]
        if rounds_x:
            call_native(tiles, cpu_pairs.ROUND_ROW, address_of(x[row]), depth, address_of(gathered[p]))
        else:
            gathered[p] = x[row]
        if row_scales.size:
            scales[p] = row_scales[row]
    total = 0
    for g in range(starts.size - 1):
        if starts[g + 1] > starts[g]:
            total += num_panels * (starts[g + 1] - starts[g] + _READING_ROWS)
    for thread in prange(num_threads):
        first, last, before = thread * total // num_threads, (thread + 1) * total // num_threads, 0
        part = np.empty((ROW_BLOCK, PANEL), np.float32)
        for g in range(starts.size - 1):
            num_rows = starts[g + 1] - starts[g]
            if num_rows == 0:
                continue
            # the panels whose costs begin between this thread's first and last
            cost = num_rows + _READING_ROWS
            own = max(0, -((before - first) // cost)), min(num_panels, -((before - last) // cost))
            for p in range(own[0], own[1]):
                panel = (g, p, starts[g], starts[g + 1])
                _group_panel(kernels, gathered, scales, weights, panel, part, out_rows, out)
            before += num_panels * cost
        keep(part)
    keep(gathered)
    keep(scales)


@compiled()
def _group_panel(
    kernels: tuple[int, int, bool, int],
    gathered: np.ndarray,
    row_scales: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray, np.ndarray],
    panel: tuple[int, int, int, int],
    part: np.ndarray,
    out_rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """`panel`: the number of its weight, its own, and its rows, from the first to one past the last."""
    tiles, wide_tiles, _, dtype = kernels
    panels, scales, biases = weights
    g, p, first_row, end = panel
    words, width = gathered.shape[1], min(PANEL, out.shape[1] - p * PANEL)
    at = panels[g] + p * words * PANEL * ELEMENT_SIZE[dtype]
    for start in range(first_row, end, ROW_BLOCK):
        rows = min(ROW_BLOCK, end - start)
        block = address_of(part)
        panel_rows(tiles, wide_tiles, address_of(gathered[start]), words * 4, rows, words, at, dtype, block, PANEL * 4)
        if row_scales.size:
            scale_rows(address_of(row_scales) + start * 4, 4, block, PANEL * 4, rows, PANEL)
        finish_rows(scales[g], biases[g], p * PANEL, block, PANEL * 4, rows, width)
        for i in range(rows):
            copy_rows(block + i * PANEL * 4, 0, address_of(out[out_rows[start + i]]) + p * PANEL * 4, 0, 1, width)
