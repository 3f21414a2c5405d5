"""GPU kernels: where min-p, top-k and top-p cut a row (see `truncation.py`), by threshold search (`gpu_search.py`).

Each truncation keeps a prefix of the order (value descending, id ascending), so what all of them keep is a prefix
too: the tokens above `cut_key`, and those equal to it with an id up to `cut_id`.

    group_maxima      pieces of rows   the greatest logit of each 64 (`gpu_estimate.py`)
    place_pivots      rows             these and a sample of the others estimate the threshold
    weigh_pivots      pieces of rows   the first pass of the first search (top_k if used, else top_p)
    collect_pieces    pieces of rows   the tokens left, if few: nearly always
    cut_rows          rows             everything that remains
"""

# R rows, V vocabulary

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import gpu_table
from sempre.kernels.sampling.gpu_elementary import KEY_PADDING, key_value, mass, order_key
from sempre.kernels.sampling.gpu_estimate import is_finite, row_parameters
from sempre.kernels.sampling.gpu_search import (
    MASS_RANGE,
    PIVOTS,
    add_weights,
    collect,
    id_of_equal,
    load_list,
    lowest_key,
    narrowed,
    search,
    search_list,
    wanted_weight,
)

_EDITS = tl.constexpr(gpu_table.EDITS)
_PIVOTS = tl.constexpr(PIVOTS)
_EVERY_ID = tl.constexpr(2**31 - 1)


@jit()
def weigh_pivots(
    logits: Any,
    edited: Any,
    row_slots: Any,
    table: Any,
    addresses: Any,
    row_maxima: Any,
    pivots: Any,
    sums: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add each piece of PIECE ids to its row's sums."""
    row = tl.program_id(1)
    flags, temperature, top_k, top_p, _ = row_parameters(row, row_slots, table, addresses)
    if (flags == 0) | ((top_k == 0) & (top_p >= 1.0)):
        return
    maximum = tl.load(row_maxima + row)
    if is_finite(maximum):
        start = row.to(tl.int64) * vocabulary
        begin = tl.program_id(0) * PIECE
        add_weights(
            logits + start,
            edited + start,
            flags & _EDITS,
            begin,
            tl.minimum(begin + PIECE, vocabulary),
            vocabulary,
            temperature,
            maximum,
            pivots + row * _PIVOTS,
            sums + row * (2 * _PIVOTS),
            top_k == 0,
            EDITS,
            BLOCK,
        )


@jit()
def collect_pieces(
    logits: Any,
    edited: Any,
    row_slots: Any,
    table: Any,
    addresses: Any,
    row_maxima: Any,
    pivots: Any,
    sums: Any,
    list_keys: Any,
    list_counters: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
) -> None:
    """Append the tokens that the first pass has left to their row's list (int32 [R, LIST]), where they fit."""
    row = tl.program_id(1)
    flags, temperature, top_k, top_p, _ = row_parameters(row, row_slots, table, addresses)
    if (flags == 0) | ((top_k == 0) & (top_p >= 1.0)):
        return
    maximum = tl.load(row_maxima + row)
    if is_finite(maximum):
        start = row.to(tl.int64) * vocabulary
        begin = tl.program_id(0) * PIECE
        low, high, inside = _after_first_pass(
            pivots + row * _PIVOTS, sums + row * (2 * _PIVOTS), maximum, vocabulary, top_k, top_p, LIST
        )
        if inside <= LIST:
            collect(
                logits + start,
                edited + start,
                flags & _EDITS,
                begin,
                tl.minimum(begin + PIECE, vocabulary),
                vocabulary,
                temperature,
                low,
                high,
                list_keys + row * LIST,
                list_counters + row,
                EDITS,
                BLOCK,
            )


@jit()
def _after_first_pass(
    pivots: Any, sums: Any, maximum: Any, vocabulary: Any, top_k: Any, top_p: Any, LIST: tl.constexpr
) -> Any:
    """(low, high, tokens to collect) as `search` has them if it ends with this pass; more than LIST if it continues."""
    zero = tl.zeros([], tl.int64)
    by_mass = top_k == 0
    greatest = order_key(maximum).to(tl.int64)
    need = wanted_weight(sums, by_mass, zero, top_k, top_p)
    low, high, count_low, count_above, _, left = narrowed(
        pivots, sums, by_mass, need, tl.load(pivots).to(tl.int64), greatest, zero + vocabulary, zero, zero, LIST
    )
    everything = (by_mass == 0) & (count_low <= LIST)
    inside = tl.where(everything, count_low, count_low - count_above)
    going_on = (left > LIST) & (low < high)
    return low, tl.where(everything, greatest, high), tl.where(going_on, zero + (LIST + 1), inside)


@jit()
def _collect_row(
    logits: Any,
    edited: Any,
    is_edited: Any,
    vocabulary: Any,
    temperature: Any,
    low: Any,
    high: Any,
    keys: Any,
    counter: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tl.debug_barrier()
    tl.store(counter, 0)
    tl.debug_barrier()
    collect(logits, edited, is_edited, 0, vocabulary, vocabulary, temperature, low, high, keys, counter, EDITS, BLOCK)
    tl.debug_barrier()


@jit()
def _cut_row(
    logits: Any,
    edited: Any,
    is_edited: Any,
    vocabulary: Any,
    temperature: Any,
    maximum: Any,
    top_k: Any,
    top_p: Any,
    lowest: Any,
    pivots: Any,
    sums: Any,
    keys: Any,
    counter: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
) -> Any:
    """(cut key, cut id), both int32, of one row with a finite maximum; its first pass is done."""
    cut = lowest_key(maximum, lowest)
    kept_equal = tl.zeros([], tl.int64) + _EVERY_ID  # tokens with the key `cut` that are kept
    equal = tl.zeros([], tl.int64) + _EVERY_ID  # all there are
    listed = tl.zeros([], tl.int64)  # > 0: the list holds this many tokens, everything that is kept among them
    excess = tl.zeros([], tl.int64)
    if top_k > 0:
        low, high, count_above, above, inside, need, passes = search(
            logits,
            edited,
            is_edited,
            vocabulary,
            temperature,
            maximum,
            cut,
            False,
            excess,
            top_k,
            top_p,
            pivots,
            sums,
            1,
            EDITS,
            BLOCK,
            LIST,
        )
        if inside <= LIST:
            if passes > 1:
                _collect_row(logits, edited, is_edited, vocabulary, temperature, low, high, keys, counter, EDITS, BLOCK)
            listed = tl.where(count_above == 0, inside, 0)
            key = load_list(keys, inside, LIST)
            low, above = search_list(key, (key > KEY_PADDING).to(tl.int64), low, above, high, need)
            inside = tl.sum((key == low.to(tl.int32)).to(tl.int64), axis=0)
        cut, kept_equal, equal = low, need - above, inside
        excess = (equal - kept_equal) * mass(key_value(cut.to(tl.int32)) - maximum)
    if top_p < 1.0:
        key = load_list(keys, listed, LIST)
        if listed > 0:
            low, high, above, inside = cut, order_key(maximum).to(tl.int64), tl.zeros([], tl.int64), listed
            weight = tl.where(key >= cut.to(tl.int32), mass(key_value(key) - maximum), 0)
            total = tl.sum(weight, axis=0) - excess
            need = tl.minimum(tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1), total)
        else:
            # starting at a key with mass: those below weigh nothing
            start = tl.maximum(cut, order_key(maximum - MASS_RANGE).to(tl.int64))
            passes = tl.where(top_k == 0, 1, 0)
            low, high, count_above, above, inside, need, passes = search(
                logits,
                edited,
                is_edited,
                vocabulary,
                temperature,
                maximum,
                start,
                True,
                excess,
                top_k,
                top_p,
                pivots,
                sums,
                passes,
                EDITS,
                BLOCK,
                LIST,
            )
            if inside <= LIST:
                if (top_k > 0) | (passes > 1):
                    _collect_row(
                        logits, edited, is_edited, vocabulary, temperature, low, high, keys, counter, EDITS, BLOCK
                    )
                key = load_list(keys, inside, LIST)
        if inside <= LIST:
            weight = tl.where(key > KEY_PADDING, mass(key_value(key) - maximum), 0)
            low, above = search_list(key, weight, low, above, high, need)
            inside = tl.sum((key == low.to(tl.int32)).to(tl.int64), axis=0)
        each = mass(key_value(low.to(tl.int32)) - maximum)
        number = (need - above + each - 1) // each
        kept_equal = tl.where(low == cut, tl.minimum(number, kept_equal), number)
        cut, equal = low, inside
    last = tl.zeros([], tl.int32) + _EVERY_ID
    if kept_equal < equal:
        last = id_of_equal(
            logits,
            edited,
            is_edited,
            vocabulary,
            temperature,
            cut.to(tl.int32),
            kept_equal.to(tl.int32),
            EDITS,
            BLOCK,
        )
    return cut.to(tl.int32), last


@jit()
def cut_rows(
    logits: Any,
    edited: Any,
    row_slots: Any,
    table: Any,
    addresses: Any,
    row_maxima: Any,
    pivots: Any,
    sums: Any,
    cut_keys: Any,
    cut_ids: Any,
    list_keys: Any,
    list_counters: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
) -> None:
    """cut_keys, cut_ids (int32 [R]) of the rows that truncate; one program per row.

    Everything is kept in a row whose maximum is not finite: the argmax reports it.
    """
    row = tl.program_id(0)
    flags, temperature, top_k, top_p, lowest = row_parameters(row, row_slots, table, addresses)
    if flags == 0:
        return
    start = row.to(tl.int64) * vocabulary
    cut_key, cut_id = tl.zeros([], tl.int32) + KEY_PADDING, tl.zeros([], tl.int32) + _EVERY_ID
    maximum = tl.load(row_maxima + row)
    if is_finite(maximum):
        cut_key, cut_id = _cut_row(
            logits + start,
            edited + start,
            flags & _EDITS,
            vocabulary,
            temperature,
            maximum,
            top_k,
            top_p,
            lowest,
            pivots + row * _PIVOTS,
            sums + row * (2 * _PIVOTS),
            list_keys + row * LIST,
            list_counters + row,
            EDITS,
            BLOCK,
            LIST,
        )
    tl.store(cut_keys + row, cut_key)
    tl.store(cut_ids + row, cut_id)
