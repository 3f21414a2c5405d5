"""GPU kernels: log-probabilities of logits, raw or processed (see `log_softmax.py`), in tiles.

The sum of masses and the rank are integers, added up atomically: no order can be seen.
"""

# R rows, V vocabulary, N tiles of a row, K best tokens

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import gpu_table
from sempre.kernels.sampling.gpu_elementary import error_visible, key_value, log_of_mass, mass, order_key
from sempre.kernels.sampling.gpu_noise import HEAD

_NUM_BEST, _WORDS = tl.constexpr(gpu_table.NUM_BEST), tl.constexpr(gpu_table.WORDS)
_HEAD = tl.constexpr(HEAD)
_NOTHING = tl.constexpr(-(2**63))


@jit()
def _ordered(key: Any, ids: Any) -> Any:
    """int64 with the order (key, then the lower id first)."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@jit()
def _wanted(row_slots: Any, table: Any, row: Any) -> Any:
    slot = tl.load(row_slots + row)
    wanted = tl.load(table + slot.to(tl.int64) * _WORDS + _NUM_BEST, mask=slot >= 0, other=-1)
    return wanted >= 0


@jit()
def best_logits_of_tiles(
    logits: Any,
    row_slots: Any,
    table: Any,
    tile_maxima: Any,
    tile_best: Any,
    totals: Any,
    ranks: Any,
    vocabulary: Any,
    num_best: Any,
    BLOCK: tl.constexpr,
) -> None:
    """tile_maxima (float32 [R, N]) and tile_best (int64 [R, N, num_best], ordered) of the rows that are reported.

    Sets totals (int64 [R]) and ranks (int32 [R]) to 0 and 1.
    """
    tile, row, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if not _wanted(row_slots, table, row):
        return
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    valid = ids < vocabulary
    x = tl.load(logits + row.to(tl.int64) * vocabulary + ids, mask=valid, other=float("-inf")).to(tl.float32)
    entry = row * num_tiles + tile
    tl.store(tile_maxima + entry, tl.max(error_visible(x), axis=0))
    if tile == 0:
        tl.store(totals + row, tl.zeros([], tl.int64))
        tl.store(ranks + row, 1)
    ordered = tl.where(valid, _ordered(order_key(x), ids), _NOTHING)
    for index in range(num_best):
        best = tl.max(ordered, axis=0)
        tl.store(tile_best + entry.to(tl.int64) * num_best + index, best)
        ordered = tl.where(ordered == best, _NOTHING, ordered)


@jit()
def sum_of_tiles(
    logits: Any,
    row_slots: Any,
    table: Any,
    targets: Any,
    tile_maxima: Any,
    totals: Any,
    ranks: Any,
    vocabulary: Any,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Add to totals (int64 [R]) the masses, and to ranks (int32 [R]) the tokens before targets[r] (int64 [R])."""
    tile, row, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if not _wanted(row_slots, table, row):
        return
    tiles = tl.arange(0, TILES)
    maxima = tl.load(tile_maxima + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    maximum = tl.max(maxima, axis=0)
    target = tl.load(targets + row).to(tl.int32)
    start = row.to(tl.int64) * vocabulary
    value = tl.load(logits + start + target).to(tl.float32)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + start + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    if maximum > float("-inf") and maximum < float("inf"):
        before = (x > value) | ((x == value) & (ids < target))
        tl.atomic_add(totals + row, tl.sum(mass(x - maximum), axis=0))
        tl.atomic_add(ranks + row, tl.sum((before & (ids < vocabulary)).to(tl.int32), axis=0))


@jit()
def report(
    logits: Any,
    row_slots: Any,
    table: Any,
    targets: Any,
    tile_maxima: Any,
    tile_best: Any,
    totals: Any,
    ranks: Any,
    head: Any,
    best: Any,
    vocabulary: Any,
    num_tiles: Any,
    num_best: Any,
    best_stride: Any,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    LOGITS: tl.constexpr,
) -> None:
    """Words 2 and 3 of head (int32 [R, HEAD]): rank and log-probability of targets[r]; 0 if there is no distribution.

    best (int32 [R, best_stride, 2]): id and log-probability (float32 bits) of the num_best best tokens.
    TILES >= num_tiles, CANDIDATES >= num_tiles * num_best. LOGITS: the logits, in place of log-probabilities.
    """
    row = tl.program_id(0)
    if not _wanted(row_slots, table, row):
        return
    tiles = tl.arange(0, TILES)
    maxima = tl.load(tile_maxima + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    maximum = tl.max(maxima, axis=0)
    if maximum == float("-inf") or maximum == float("inf"):
        tl.store(head + row * _HEAD + 2, 0)
        return
    log_sum = log_of_mass(tl.load(totals + row))
    target = tl.load(targets + row)
    value = tl.load(logits + row.to(tl.int64) * vocabulary + target).to(tl.float32)
    tl.store(head + row * _HEAD + 2, tl.load(ranks + row))
    if LOGITS:
        # as the best below: a zero has no sign
        reported = key_value(order_key(value))
    else:
        reported = (value - maximum) - log_sum
    tl.store(head + row * _HEAD + 3, reported.to(tl.int32, bitcast=True))
    candidates = tl.arange(0, CANDIDATES)
    ordered = tl.load(
        tile_best + row.to(tl.int64) * num_tiles * num_best + candidates,
        mask=candidates < num_tiles * num_best,
        other=_NOTHING,
    )
    for index in range(num_best):
        first = tl.max(ordered, axis=0)
        place = best + (row.to(tl.int64) * best_stride + index) * 2
        logprob = key_value((first >> 32).to(tl.int32))
        if not LOGITS:
            logprob = (logprob - maximum) - log_sum
        tl.store(place, (0x7FFFFFFF - (first & 0x7FFFFFFF)).to(tl.int32))
        tl.store(place + 1, logprob.to(tl.int32, bitcast=True))
        ordered = tl.where(ordered == first, _NOTHING, ordered)
