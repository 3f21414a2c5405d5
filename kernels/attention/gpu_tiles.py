"""The one order in which a GPU program visits keys: tiles of 64 inside splits of SPLIT keys, both ascending from 0.

# M query rows of a program (token, then head of the group), 64 keys of a tile, D head dim
Scores and the running maximum are in units of log2; the tensor core sums the row over the same rounded weights that
multiply the values, so that the order is the same for every number of warps. A masked key contributes exact zeros and a
fully masked tile changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import triton.language as tl

from sempre.kernels.activation.gpu import soft_capped
from sempre.kernels.gpu_jit import jit, prefetch

TILE = 64
# part of the result: must never depend on the shape of a step
SPLIT = 512
# elements of 16 bit in a cache line
LINE = tl.constexpr(64)
# below every score, and finite so that no difference of maxima is NaN
LOWEST = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(math.log2(math.e))


@jit()
def find_request(starts: Any, index: Any, num_requests: Any, TOKENS: tl.constexpr) -> Any:
    """The request of query tile `index` when request r's tiles begin at starts[r] // TOKENS + r."""
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= index:
            low = middle + 1
        else:
            high = middle
    return low - 1


@jit()
def prefetch_tiles(
    context: Any,
    low: Any,
    keys: Any,
    values: Any,
    table: Any,
    head: Any,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Prefetch the keys and values of the first TILES tiles from key `low` on; a block holds one tile."""
    LINES: tl.constexpr = 64 * DIM // LINE
    for j in tl.static_range(TILES):
        start = low + j * 64
        if start < context:
            page = tl.load(table + start // 64).to(tl.int64)
            at = (page * KV_HEADS + head) * BLOCK * DIM + tl.arange(0, LINES) * LINE
            prefetch(keys + at)
            prefetch(values + at)


@jit()
def _values(
    at: Any, key: Any, end: Any, d: Any, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr
) -> Any:
    if MASKED:
        v = tl.load(at, mask=(key < end)[:, None] & (d < DIM)[None, :], other=0.0)
    elif BLOCK_DIM != DIM:
        v = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        v = tl.load(at)
    return v


@jit()
def walk_tiles(
    q: Any,
    m: Any,
    l: Any,  # noqa: E741
    acc: Any,
    low: Any,
    high: Any,
    position: Any,
    end: Any,
    keys: Any,
    values: Any,
    table: Any,
    head: Any,
    scale_log2: Any,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAP_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """Add the tiles of keys [low, high) to the state (m, l, acc) of the online softmax; no key >= `end` is read.

    SOFT_CAP: 0, or scores are SOFT_CAP * tanh(CAP_SCALE * score) before they are scaled.
    """
    n = tl.arange(0, 64)
    d = tl.arange(0, BLOCK_DIM)
    # keys and values of wide heads in float32 do not fit the shared memory together
    LATE: tl.constexpr = BLOCK_DIM > 256 and q.dtype == tl.float32
    for start in range(low, high, 64):
        key = start + n
        if BLOCK == 64:
            page = tl.load(table + start // 64).to(tl.int64)
            at = ((page * KV_HEADS + head) * BLOCK + n) * DIM
        else:
            if MASKED:
                pages = tl.load(table + key // BLOCK, mask=key < end, other=0).to(tl.int64)
            else:
                pages = tl.load(table + key // BLOCK).to(tl.int64)
            at = ((pages * KV_HEADS + head) * BLOCK + key % BLOCK) * DIM
        k_at = keys + at[None, :] + d[:, None]
        v_at = values + at[:, None] + d[None, :]
        if MASKED:
            k = tl.load(k_at, mask=(key < end)[None, :] & (d < DIM)[:, None], other=0.0)
        elif BLOCK_DIM != DIM:
            k = tl.load(k_at, mask=(d < DIM)[:, None], other=0.0)
        else:
            k = tl.load(k_at)
        if not LATE:
            v = _values(v_at, key, end, d, DIM, BLOCK_DIM, MASKED)
        scores = tl.dot(q, k, input_precision="ieee")
        if SOFT_CAP > 0:
            scores = soft_capped(scores, CAP_SCALE, SOFT_CAP)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(tl.fma(scores, scale_log2, -m_new[:, None]))
        alpha = tl.exp2(m - m_new)
        m = m_new
        weights = p.to(q.dtype)
        ones = tl.full([64, 16], 1.0, q.dtype)
        if LATE:
            v = _values(v_at, key, end, d, DIM, BLOCK_DIM, MASKED)
        l = tl.dot(weights, ones, l * alpha[:, None], input_precision="ieee")  # noqa: E741
        acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
    return m, l, acc


@jit()
def walk_split(
    q: Any,
    low: Any,
    high: Any,
    first_position: Any,
    position: Any,
    end: Any,
    keys: Any,
    values: Any,
    table: Any,
    head: Any,
    scale_log2: Any,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> Any:
    """The partial (m, l, acc) of keys [low, high) of one split, from an empty state."""
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M, 16], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    middle = low
    if WINDOW == 0:
        # below `middle` every row sees every key
        middle = tl.minimum(tl.maximum((first_position + 1) // 64 * 64, low), high)
        m, l, acc = walk_tiles(  # noqa: E741
            q, m, l, acc, low, middle, position, end, keys, values, table, head, scale_log2,
            KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, SOFT_CAP, CAP_SCALE, False,
        )  # fmt: skip
    m, l, acc = walk_tiles(  # noqa: E741
        q, m, l, acc, middle, high, position, end, keys, values, table, head, scale_log2,
        KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, SOFT_CAP, CAP_SCALE, True,
    )  # fmt: skip
    # all 16 columns hold the row's sum
    return m, tl.max(l, axis=1), acc


@jit()
def empty_state(
    sinks: Any, query_head: Any, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_SINKS: tl.constexpr
) -> Any:
    """What a merge begins with, (m, l, acc) of ROWS rows: nothing, or the sink of each row's query head."""
    if HAS_SINKS:
        m = tl.load(sinks + query_head) * LOG2_E
        l = tl.full([ROWS], 1.0, tl.float32)  # noqa: E741
    else:
        m = tl.full([ROWS], LOWEST, tl.float32)
        l = tl.zeros([ROWS], tl.float32)  # noqa: E741
    return m, l, tl.zeros([ROWS, BLOCK_DIM], tl.float32)


@jit()
def merge(m: Any, l: Any, acc: Any, m_split: Any, l_split: Any, acc_split: Any) -> Any:  # noqa: E741
    """The state after one more split; merging an empty split changes nothing."""
    m_new = tl.maximum(m, m_split)
    old = tl.exp2(m - m_new)
    new = tl.exp2(m_split - m_new)
    l = tl.fma(l, old, l_split * new)  # noqa: E741
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), acc_split * new[:, None])
    return m_new, l, acc
