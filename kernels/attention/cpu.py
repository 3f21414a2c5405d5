"""CPU paged attention.

# R requests, T query tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, B = 16 keys per block
A unit of work is (a few query tokens of one request) x (one key head): up to MAX_ROWS rows that share the keys.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np
import torch
from numba import prange

from sempre.kernels.activation.cpu import soft_cap_row
from sempre.kernels.attention.contract import HeadLayout, KvCache, PagedBatch, ScoreParams
from sempre.kernels.attention.cpu_scaled import scaled_keys, scaled_values
from sempre.kernels.attention.cpu_tiles import (
    COPY_ROW,
    DIVIDE_ROW,
    MOST_ROWS,
    MULTIPLY_ROW,
    PV,
    QK,
    SOFTMAX_ROW,
    TILES,
)
from sempre.kernels.dtypes import ELEMENT_SIZE, FP8_CODE, cache_dtype_code, widen
from sempre.kernels.fp8 import FP8
from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.native import call_native, call_native_float

BLOCK = 16
TILE = 64
BLOCKS_PER_TILE = TILE // BLOCK
MAX_ROWS = 12
_NO_SINKS = np.empty(0, np.float32)


def allocate_kv_cache(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> KvCache:
    """A cache of zeros; memory that is never written stays unmapped."""
    shape = (num_blocks, num_kv_heads, block_size)
    scales = [_unmapped_zeros(shape, torch.float32) for _ in range(2 if dtype is FP8 else 0)]
    return KvCache(
        _unmapped_zeros((num_blocks, num_kv_heads, head_dim, block_size), dtype),
        _unmapped_zeros((*shape, head_dim), dtype),
        *scales,
    )


def _unmapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written; in huge pages where available.

    torch.zeros would write, and so map, every page. Scattered blocks in small pages cost a page fault each at the
    first write, and an address translation each at every read.
    """
    memory = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # a kernel built without huge pages rejects the advice; small pages will do
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


@compiled()
def _scores(tiles: int, q: int, rows: int, dim: int, k0: int, k1: int, k2: int, k3: int, scores: int) -> None:
    row_bytes = dim * 4
    for done in range(0, rows, MOST_ROWS):
        count = min(MOST_ROWS, rows - done)
        q_at, out = q + done * row_bytes, scores + done * TILE * 4
        call_native(tiles, QK + count - 1, q_at, row_bytes, k0, k1, k2, k3, dim, out)


@compiled()
def _weighted_values(
    tiles: int, p: int, rows: int, dim: int, v0: int, v1: int, v2: int, v3: int, first: int, past: int, acc: int
) -> None:
    """Add the weighted values of the tile's keys [first, past) to each row."""
    if past <= first:
        return
    for done in range(0, rows, MOST_ROWS):
        count = min(MOST_ROWS, rows - done)
        p_at, out = p + done * TILE * 4, acc + done * dim * 4
        call_native(tiles, PV + count - 1, p_at, v0, v1, v2, v3, first, past, dim, out)


@compiled()
def _values_of_each(
    tiles: int,
    p: int,
    tokens: int,
    group: int,
    dim: int,
    v0: int,
    v1: int,
    v2: int,
    v3: int,
    first: int,
    past: int,
    position: int,
    window: int,
    acc: int,
) -> None:
    """Add to each token's rows the weighted values of those keys in [first, past) that it sees."""
    for t in range(tokens):
        low = max(first, position + t - window + 1) if window > 0 else first
        high = min(past, position + t + 1)
        shift = t * group
        p_at, acc_at = p + shift * TILE * 4, acc + shift * dim * 4
        _weighted_values(tiles, p_at, group, dim, v0, v1, v2, v3, low, high, acc_at)


@compiled()
def _seen_values(
    tiles: int,
    p: int,
    tokens: int,
    group: int,
    dim: int,
    v0: int,
    v1: int,
    v2: int,
    v3: int,
    in_tile: int,
    position: int,
    window: int,
    acc: int,
) -> None:
    """Add to each row the weighted values of the keys that it sees; `position` is the first token's, in the tile.

    A weight of zero would not keep a masked value that is not finite out of a row, so masked values are skipped. Keys
    that all tokens see are added to all rows together, those before and after only to the rows that see them.
    """
    low = min(max(0, position + tokens - window), in_tile) if window > 0 else 0
    high = min(max(0, position + 1), in_tile)
    if low > 0:
        _values_of_each(tiles, p, tokens, group, dim, v0, v1, v2, v3, 0, low, position, window, acc)
    _weighted_values(tiles, p, tokens * group, dim, v0, v1, v2, v3, low, high, acc)
    if tokens > 1:
        _values_of_each(tiles, p, tokens, group, dim, v0, v1, v2, v3, max(low, high), in_tile, position, window, acc)


@compiled()
def _widen_blocks(b0: int, b1: int, b2: int, b3: int, target: int, count: int, dtype: int) -> tuple[int, int, int, int]:
    """Widen four blocks of `count` elements into scratch memory; their addresses there."""
    step = count * 4
    widen(b0, target, count, dtype)
    widen(b1, target + step, count, dtype)
    widen(b2, target + 2 * step, count, dtype)
    widen(b3, target + 3 * step, count, dtype)
    return target, target + step, target + 2 * step, target + 3 * step


@compiled()
def _unit(
    tiles: int,
    q: int,
    q_row_bytes: int,
    tokens: int,
    first_position: int,
    group: int,
    dim: int,
    keys: int,
    values: int,
    k_scales: int,
    v_scales: int,
    dtype: int,
    head: int,
    kv_heads: int,
    table: np.ndarray,
    scale: float,
    cap: float,
    window: int,
    sinks: np.ndarray,
    out: int,
    out_row_bytes: int,
) -> None:
    rows = tokens * group
    # capped scores are already scaled
    left_scale = 1.0 if cap > 0 else scale
    head_bytes = dim * 4
    queries = np.empty((rows, dim), np.float32)
    scores = np.empty((rows, TILE), np.float32)
    acc = np.zeros((rows, dim), np.float32)
    state = np.empty((rows, 2), np.float32)
    wide = np.empty((2 * TILE * dim if dtype != 0 else 1,), np.float32)
    queries_at, scores_at, wide_at = address_of(queries), address_of(scores), address_of(wide)
    acc_at, state_at = address_of(acc), address_of(state)
    for t in range(tokens):
        for g in range(group):
            query_at = queries_at + (t * group + g) * head_bytes
            call_native(tiles, COPY_ROW, q + t * q_row_bytes + g * head_bytes, query_at, dim)
    for i in range(rows):
        state[i, 0], state[i, 1] = -1e30, 0.0
        if sinks.size > 0:
            state[i, 0], state[i, 1] = sinks[head * group + i % group], 1.0
    last_position = first_position + tokens - 1
    start = 0
    if window > 0 and first_position - window + 1 > 0:
        start = (first_position - window + 1) // TILE * TILE
    block_bytes = BLOCK * dim * ELEMENT_SIZE[dtype]
    for tile in range(start, last_position + 1, TILE):
        in_tile = min(TILE, last_position + 1 - tile)
        last_block = (in_tile - 1) // BLOCK
        first = tile // BLOCK
        # blocks past the last key repeat its block: their scores are masked and their values never read
        n0 = table[first] * kv_heads + head
        n1 = table[first + min(1, last_block)] * kv_heads + head
        n2 = table[first + min(2, last_block)] * kv_heads + head
        n3 = table[first + min(3, last_block)] * kv_heads + head
        b0, b1, b2, b3 = n0 * block_bytes, n1 * block_bytes, n2 * block_bytes, n3 * block_bytes
        k0, k1, k2, k3 = keys + b0, keys + b1, keys + b2, keys + b3
        v0, v1, v2, v3 = values + b0, values + b1, values + b2, values + b3
        half = BLOCKS_PER_TILE * BLOCK * dim * 4
        if dtype == FP8_CODE:
            k0, k1, k2, k3 = scaled_keys(keys, k_scales, n0, n1, n2, n3, dim, wide_at)
            v0, v1, v2, v3 = scaled_values(values, v_scales, n0, n1, n2, n3, dim, wide_at + half)
        elif dtype != 0:
            k0, k1, k2, k3 = _widen_blocks(k0, k1, k2, k3, wide_at, BLOCK * dim, dtype)
            v0, v1, v2, v3 = _widen_blocks(v0, v1, v2, v3, wide_at + half, BLOCK * dim, dtype)
        _scores(tiles, queries_at, rows, dim, k0, k1, k2, k3, scores_at)
        for i in range(rows):
            position = first_position + i // group
            low = position - window + 1 - tile if window > 0 else 0
            row_at, sums_at = scores_at + i * TILE * 4, state_at + i * 8
            if cap > 0:
                soft_cap_row(row_at, TILE, scale / cap, cap)
            factor = call_native_float(tiles, SOFTMAX_ROW, row_at, low, position + 1 - tile, left_scale, sums_at)
            call_native(tiles, MULTIPLY_ROW, acc_at + i * head_bytes, factor, dim)
        first_seen = first_position - tile
        _seen_values(tiles, scores_at, tokens, group, dim, v0, v1, v2, v3, in_tile, first_seen, window, acc_at)
    for i in range(rows):
        t, g = i // group, i % group
        out_at = out + t * out_row_bytes + g * head_bytes
        call_native(tiles, DIVIDE_ROW, acc_at + i * head_bytes, state_at + i * 8 + 4, out_at, dim)
    keep(queries)
    keep(scores)
    keep(acc)
    keep(state)
    keep(wide)


@compiled()
def _first_outside(
    block_tables: np.ndarray, query_starts: np.ndarray, context_lens: np.ndarray, rows: int, num_blocks: int
) -> int:
    """The first request whose rows, context or blocks do not exist; -1 if all do."""
    requests = len(context_lens)
    if len(query_starts) != requests + 1 or len(block_tables) < requests:
        return 0
    for r in range(requests):
        start, stop, context = query_starts[r], query_starts[r + 1], context_lens[r]
        if start == stop:
            continue
        if not (0 <= start < stop <= rows and stop - start <= context <= block_tables.shape[1] * BLOCK):
            return r
        for block in range((context + BLOCK - 1) // BLOCK):
            if not 0 <= block_tables[r, block] < num_blocks:
                return r
    return -1


@compiled(parallel=True)
def _paged_attention(
    tiles: int,
    qkv: int,
    keys: int,
    values: int,
    k_scales: int,
    v_scales: int,
    dtype: int,
    block_tables: np.ndarray,
    query_starts: np.ndarray,
    context_lens: np.ndarray,
    heads: int,
    kv_heads: int,
    dim: int,
    row_heads: int,
    scale: float,
    cap: float,
    window: int,
    sinks: np.ndarray,
    out: int,
) -> None:
    group = heads // kv_heads
    tile_tokens = max(1, MAX_ROWS // group)
    requests = len(context_lens)
    first_unit = np.empty(requests + 1, np.int64)
    first_unit[0] = 0
    for r in range(requests):
        tokens = query_starts[r + 1] - query_starts[r]
        first_unit[r + 1] = first_unit[r] + (tokens + tile_tokens - 1) // tile_tokens
    q_row_bytes, out_row_bytes = row_heads * dim * 4, heads * dim * 4
    num_tiles = first_unit[requests]
    for unit in prange(num_tiles * kv_heads):
        # consecutive units differ in the key head, and long and short tiles alternate between the threads
        query_tile, head = unit // kv_heads, unit % kv_heads
        r = np.searchsorted(first_unit, query_tile, side="right") - 1
        first_token = (query_tile - first_unit[r]) * tile_tokens
        start, stop = query_starts[r], query_starts[r + 1]
        tokens = min(tile_tokens, stop - start - first_token)
        row = start + first_token
        first_position = context_lens[r] - (stop - start) + first_token
        shift = head * group * dim * 4
        _unit(
            tiles,
            qkv + row * q_row_bytes + shift,
            q_row_bytes,
            tokens,
            first_position,
            group,
            dim,
            keys,
            values,
            k_scales,
            v_scales,
            dtype,
            head,
            kv_heads,
            block_tables[r],
            scale,
            cap,
            window,
            sinks,
            out + row * out_row_bytes + shift,
            out_row_bytes,
        )


def first_outside(batch: PagedBatch, num_rows: int, num_blocks: int) -> int:
    """The first request whose rows, context or blocks do not exist; -1 if all do."""
    if (num_rows, num_blocks) in batch.fits:
        return -1
    wrong = int(_first_outside(*batch.arrays, num_rows, num_blocks))
    if wrong < 0:
        batch.fits.add((num_rows, num_blocks))
    return wrong


def paged_attention(
    qkv: torch.Tensor, cache: KvCache, batch: PagedBatch, heads: HeadLayout, scores: ScoreParams, out: torch.Tensor
) -> torch.Tensor:
    """See the facade; the batch must fit, its bounds do not matter."""
    _paged_attention(
        TILES.table,
        qkv.data_ptr(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        *cache.scale_addresses,
        cache_dtype_code(cache.k.dtype),
        *batch.arrays,
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        heads.qkv_width // heads.head_dim,
        scores.scale,
        scores.soft_cap or 0.0,
        scores.window or 0,
        scores.sinks.numpy() if scores.sinks is not None else _NO_SINKS,
        out.data_ptr(),
    )
    return out
