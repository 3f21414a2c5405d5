"""GPU kernels: the argmax over noisy logits in tiles, and the final one that publishes the tokens (see `noise.py`).

A row's tiles are independent programs; (value descending, id ascending) is a total order, so neither the tiles nor the
order in which they are merged affects the result.
"""

# R rows, V vocabulary, N tiles of a row

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit, wait_for_previous
from sempre.kernels.sampling import gpu_table
from sempre.kernels.sampling.gpu_elementary import divided, error_visible, gumbel, load_logits, order_key, philox

# 32-bit words of one row's report: token id, flags, rank, bits of the log-probability
HEAD = 4
BAD_LOGITS, NOTHING_ALLOWED = 1, 2

_FLAGS, _TEMPERATURE = tl.constexpr(gpu_table.FLAGS), tl.constexpr(gpu_table.TEMPERATURE)
_SEED_LOW, _SEED_HIGH = tl.constexpr(gpu_table.SEED_LOW), tl.constexpr(gpu_table.SEED_HIGH)
_COUNTS, _HISTORY = tl.constexpr(gpu_table.COUNTS), tl.constexpr(gpu_table.HISTORY)
_EDITS, _TRUNCATES = tl.constexpr(gpu_table.EDITS), tl.constexpr(gpu_table.TRUNCATES)
_WORDS = tl.constexpr(gpu_table.WORDS)
_BAD_LOGITS, _NOTHING_ALLOWED = tl.constexpr(BAD_LOGITS), tl.constexpr(NOTHING_ALLOWED)
_HEAD = tl.constexpr(HEAD)
_NO_ID = tl.constexpr(2**31 - 1)


@jit()
def _ids_of_word(first: Any, counter: Any, WORD: tl.constexpr) -> Any:
    """The ids that word number WORD of each counter serves; `first` is a multiple of 64 (see `rng.py`)."""
    return first + (counter >> 4) * 64 + WORD * 16 + (counter & 15)


@jit()
def keep_prefix(x: Any, ids: Any, cut_key: Any, cut_id: Any) -> Any:
    """x up to its cut, -inf after it."""
    key = order_key(x)
    keep = (key > cut_key) | ((key == cut_key) & (ids <= cut_id))
    return tl.where(keep, x, float("-inf"))


@jit()
def best_of_tiles(
    logits: Any,
    edited: Any,
    row_slots: Any,
    positions: Any,
    table: Any,
    cut_keys: Any,
    cut_ids: Any,
    tile_values: Any,
    tile_ids: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """tile_values (float32), tile_ids (int32) [R, N]: the best (value, id) of logits[r, tile] (or of `edited`).

    Each program owns one tile of one row. Row r's parameters are table[row_slots[r]]; a slot of -1 is an unused row.
    The value is that of `noise.best_of_chunks`: the logit, or logit / temperature + noise, in float32.
    """
    wait_for_previous()
    tile, row, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    words = table + slot.to(tl.int64) * _WORDS
    flags = tl.load(words + _FLAGS)
    temperature = tl.load(words + _TEMPERATURE).to(tl.float32, bitcast=True)
    counter = tl.arange(0, BLOCK // 4)
    first = tile * BLOCK
    ids_0, ids_1 = _ids_of_word(first, counter, 0), _ids_of_word(first, counter, 1)
    ids_2, ids_3 = _ids_of_word(first, counter, 2), _ids_of_word(first, counter, 3)
    start = row.to(tl.int64) * vocabulary
    is_edited = flags & _EDITS
    x_0 = load_logits(logits + start, edited + start, is_edited, ids_0, vocabulary, EDITS)
    x_1 = load_logits(logits + start, edited + start, is_edited, ids_1, vocabulary, EDITS)
    x_2 = load_logits(logits + start, edited + start, is_edited, ids_2, vocabulary, EDITS)
    x_3 = load_logits(logits + start, edited + start, is_edited, ids_3, vocabulary, EDITS)
    if temperature != 0.0:
        if temperature != 1.0:
            x_0, x_1 = divided(x_0, temperature), divided(x_1, temperature)
            x_2, x_3 = divided(x_2, temperature), divided(x_3, temperature)
        if TRUNCATES:  # noqa: SIM102, a constant and a value
            if (flags & _TRUNCATES) != 0:
                cut_key, cut_id = tl.load(cut_keys + row), tl.load(cut_ids + row)
                x_0, x_1 = keep_prefix(x_0, ids_0, cut_key, cut_id), keep_prefix(x_1, ids_1, cut_key, cut_id)
                x_2, x_3 = keep_prefix(x_2, ids_2, cut_key, cut_id), keep_prefix(x_3, ids_3, cut_key, cut_id)
        allowed = (x_0 != float("-inf")) | (x_1 != float("-inf")) | (x_2 != float("-inf")) | (x_3 != float("-inf"))
        if tl.max(allowed.to(tl.int32), axis=0) > 0:
            position = tl.load(positions + row).to(tl.uint32)
            key_0 = tl.load(words + _SEED_LOW).to(tl.uint32, bitcast=True)
            key_1 = tl.load(words + _SEED_HIGH).to(tl.uint32, bitcast=True)
            c0 = (tile * (BLOCK // 4) + counter).to(tl.uint32)
            w_0, w_1, w_2, w_3 = philox(c0, position, key_0, key_1)
            x_0, x_1 = x_0 + gumbel(w_0), x_1 + gumbel(w_1)
            x_2, x_3 = x_2 + gumbel(w_2), x_3 + gumbel(w_3)
    best, ids = error_visible(x_0), ids_0
    x_1, x_2, x_3 = error_visible(x_1), error_visible(x_2), error_visible(x_3)
    ids = tl.where(x_1 > best, ids_1, ids)
    best = tl.where(x_1 > best, x_1, best)
    ids = tl.where(x_2 > best, ids_2, ids)
    best = tl.where(x_2 > best, x_2, best)
    ids = tl.where(x_3 > best, ids_3, ids)
    best = tl.where(x_3 > best, x_3, best)
    value = tl.max(best, axis=0)
    tl.store(tile_values + row * num_tiles + tile, value)
    tl.store(tile_ids + row * num_tiles + tile, tl.min(tl.where(best == value, ids, _NO_ID), axis=0))


@jit()
def publish(
    row_slots: Any,
    positions: Any,
    table: Any,
    addresses: Any,
    row_errors: Any,
    tile_values: Any,
    tile_ids: Any,
    token_ids: Any,
    head: Any,
    num_tiles: Any,
    EDITS: tl.constexpr,
    ADVANCES: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """token_ids int64 [R] and head int32 [R, HEAD] from the tiles' best; TILES >= num_tiles.

    A row in error gets token 0 and a flag. ADVANCES: the token is added to its slot's counts and history (of
    `addresses`, the table as int64) if it has them, for the next step. Clears row_errors.
    """
    wait_for_previous()
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if slot < 0:
        tl.store(token_ids + row, tl.zeros([], tl.int64))
        tl.store(head + row * _HEAD, 0)
        tl.store(head + row * _HEAD + 1, 0)
        return
    tiles = tl.arange(0, TILES)
    values = tl.load(tile_values + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    ids = tl.load(tile_ids + row * num_tiles + tiles, mask=tiles < num_tiles, other=_NO_ID)
    value = tl.max(values, axis=0)
    token = tl.min(tl.where(values == value, ids, _NO_ID), axis=0)
    flag = tl.where(value == float("inf"), _BAD_LOGITS, tl.where(value == float("-inf"), _NOTHING_ALLOWED, 0))
    if EDITS:
        flag = tl.where(tl.load(row_errors + row) != 0, _BAD_LOGITS, flag)
        tl.store(row_errors + row, 0)
    token = tl.where(flag == 0, token, 0)
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(head + row * _HEAD, token)
    tl.store(head + row * _HEAD + 1, flag)
    if ADVANCES:
        tensors = addresses + slot.to(tl.int64) * (_WORDS // 2)
        counts, history = tl.load(tensors + _COUNTS), tl.load(tensors + _HISTORY)
        if (flag == 0) & (counts != 0):
            count = counts.to(tl.pointer_type(tl.int32)) + token
            tl.store(count, tl.load(count) + 1)
        if (flag == 0) & (history != 0):
            tl.store(history.to(tl.pointer_type(tl.int32)) + tl.load(positions + row), token)
