"""GPU linear layers of few rows whose K has leaves: programs for each leaf, then the tree. T rows, N out, K in."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.linear.gpu_table import PROMOTED, Tile
from sempre.kernels.linear.gpu_tiles import LINE_BYTES, leaf_sum, power_of_two, prefetch_rows, prefetched_lines
from sempre.kernels.linear.weights import GpuLinearWeight

# up to as many, each leaf has programs of its own
MOST_SPLIT_ROWS = 64
SUMMED_COLUMNS = 512


@jit(runtime=("T",))
def _leaf_partials(
    x: Any,
    row_scales: Any,
    w: Any,
    out: Any,
    T: Any,
    N: Any,
    K: Any,
    D: Any,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """The sum of each leaf as `_linear` has it, into out float32 [LEAVES, T, N]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    leaf = tl.program_id(2)
    n_in, t_in = tl.minimum(n, N - 1), tl.minimum(t, T - 1)
    prefetch_rows(w + leaf * D, n_in, K, LINES)
    wait_for_previous()
    acc = leaf_sum(x, row_scales, w, n_in, t_in, leaf, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
    at = out + (leaf.to(tl.int64) * T + t.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(at, tl.trans(acc), mask=(t < T)[:, None] & (n < N)[None, :])


@jit(runtime=("T",))
def _sum_leaves(
    partials: Any,
    scale: Any,
    bias: Any,
    out: Any,
    T: Any,
    N: Any,
    LEAVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """out[t, n] = the tree over partials float32 [LEAVES, T, N], * scale[n], + bias[n], if there."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < N
    wait_for_previous()
    at, step = partials + t * N + n, T.to(tl.int64) * N
    acc = tl.load(at, mask=inside, other=0.0) + tl.load(at + step, mask=inside, other=0.0)
    if LEAVES > 2:
        acc += tl.load(at + 2 * step, mask=inside, other=0.0) + tl.load(at + 3 * step, mask=inside, other=0.0)
    if LEAVES > 4:
        four = tl.load(at + 4 * step, mask=inside, other=0.0) + tl.load(at + 5 * step, mask=inside, other=0.0)
        four += tl.load(at + 6 * step, mask=inside, other=0.0) + tl.load(at + 7 * step, mask=inside, other=0.0)
        acc += four
    if HAS_SCALE:
        acc *= tl.load(scale + n, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * N + n, acc.to(out.dtype.element_ty), mask=inside)


def run_split(
    x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, tile: Tile, row_scales: torch.Tensor | None
) -> torch.Tensor:
    """`run_tile` with programs for each leaf, and the sum of theirs."""
    rows, (columns, depth) = x.shape[0], w.weight.shape
    leaf_depth = depth // w.leaves
    partials = torch.empty(w.leaves, rows, columns, dtype=torch.float32, device=x.device)
    _leaf_partials[(triton.cdiv(rows, tile.block_t), triton.cdiv(columns, tile.block_n), w.leaves)](
        x,
        row_scales,
        w.weight,
        partials,
        rows,
        columns,
        depth,
        leaf_depth,
        BT=tile.block_t,
        BN=tile.block_n,
        BK=tile.block_k,
        EVEN_K=leaf_depth % tile.block_k == 0,
        LEAVES=w.leaves,
        HAS_ROW_SCALES=row_scales is not None,
        PROMOTED=PROMOTED if row_scales is not None else 0,
        LINES=min(prefetched_lines(rows, w), power_of_two(leaf_depth * w.weight.itemsize // LINE_BYTES)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    _sum_leaves[(rows, triton.cdiv(columns, SUMMED_COLUMNS))](
        partials,
        w.scale,
        w.bias,
        out,
        rows,
        columns,
        LEAVES=w.leaves,
        HAS_BIAS=w.bias is not None,
        HAS_SCALE=w.scale is not None,
        BN=SUMMED_COLUMNS,
        num_warps=4,
        **CHAINED,
    )
    return out
