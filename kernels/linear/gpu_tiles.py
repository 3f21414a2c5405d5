"""What the programs of GPU linear layers have in common: the sums over K, and prefetching. T rows, N out, K in."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit, prefetch, wait_for_tensor_cores
from sempre.kernels.linear.weights import GpuLinearWeight

LINE_BYTES = 128
# a part of the L2 cache
PREFETCHED_BYTES = 16 << 20
# more rows are compute-bound
MOST_PREFETCHING_ROWS = 64


@jit()
def prefetch_rows(w: Any, n: Any, K: Any, LINES: tl.constexpr) -> None:
    """Prefetch the first LINES lines of 128 bytes of rows n of the weight, which no other kernel writes."""
    if LINES > 0:
        PER_LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
        prefetch(w + n.to(tl.int64)[:, None] * K + (tl.arange(0, LINES) * PER_LINE)[None, :])


@jit()
def accumulate(
    w: Any,
    x: Any,
    n: Any,
    t: Any,
    K: Any,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> Any:
    """acc[n, t] = sum over ascending k of w[n, k] x[t, k]; a weight of another dtype is widened to that of x.

    PROMOTED: 0, or for fp8 operands the elements of K after which their sum goes to the float32 accumulator.
    """
    return accumulate_part(w, x, n, t, K, K, BN, BT, BK, EVEN_K, PROMOTED)


@jit()
def accumulate_part(
    w: Any,
    x: Any,
    n: Any,
    t: Any,
    K: Any,
    D: Any,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> Any:
    """`accumulate` over the first D of K elements."""
    k = tl.arange(0, BK)
    w_at = w + n.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + t.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros([BN, BT], tl.float32)
    for start in range(0, D, BK):
        if EVEN_K:
            w_tile = tl.load(w_at)
            x_tile = tl.load(x_at)
        else:
            inside = start + k < D
            w_tile = tl.load(w_at, mask=inside[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
        if PROMOTED > 0:
            acc = tl.dot(w_tile, x_tile, acc, max_num_imprecise_acc=PROMOTED)
        else:
            acc = tl.dot(w_tile.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
            if w_tile.dtype != x_tile.dtype:
                wait_for_tensor_cores()
        w_at += BK
        x_at += BK
    return acc


@jit()
def leaf_sum(
    x: Any,
    row_scales: Any,
    w: Any,
    n: Any,
    t: Any,
    leaf: Any,
    K: Any,
    D: Any,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> Any:
    """acc[n, t] over the D elements of one leaf, times row_scales[t, leaf] if they are there."""
    acc = accumulate_part(w + leaf * D, x + leaf * D, n, t, K, D, BN, BT, BK, EVEN_K, PROMOTED)
    if HAS_ROW_SCALES:
        acc *= tl.load(row_scales + t * LEAVES + leaf)[None, :]
    return acc


@jit()
def tree_sum(
    x: Any,
    row_scales: Any,
    w: Any,
    n: Any,
    t: Any,
    K: Any,
    D: Any,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> Any:
    """((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), of as many leaves as there are, at least two."""
    acc = leaf_sum(x, row_scales, w, n, t, 0, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
    acc += leaf_sum(x, row_scales, w, n, t, 1, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
    if LEAVES > 2:
        pair = leaf_sum(x, row_scales, w, n, t, 2, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
        pair += leaf_sum(x, row_scales, w, n, t, 3, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
        acc += pair
    if LEAVES > 4:
        four = leaf_sum(x, row_scales, w, n, t, 4, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
        four += leaf_sum(x, row_scales, w, n, t, 5, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
        last = leaf_sum(x, row_scales, w, n, t, 6, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
        last += leaf_sum(x, row_scales, w, n, t, 7, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
        four += last
        acc += four
    return acc


def prefetched_lines(rows: int, w: GpuLinearWeight) -> int:
    """Lines of each weight row that a matmul of few rows prefetches before it waits for x; a power of two."""
    if rows > MOST_PREFETCHING_ROWS or w.scheme is not None:
        return 0
    lines = min(w.in_features * w.weight.itemsize // LINE_BYTES, PREFETCHED_BYTES // (w.out_features * LINE_BYTES))
    return power_of_two(lines)


def power_of_two(most: int) -> int:
    """The largest one up to `most`, or 0."""
    return 1 << (most.bit_length() - 1) if most else 0
