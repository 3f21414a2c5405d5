"""The threshold search of `gpu_truncation.py`: the parts that work on a row, or on a piece of one.

A search narrows the interval [low, high] of order keys that holds the last key kept. Eight ascending pivots cut it; a
pass over the row gives the number and the integer mass of the tokens at or above each. Once few tokens are left in the
interval, they are collected in a list, on which the search ends by bisection. Integer sums do not depend on order, so
pivots, passes and lists do not affect the result.
"""

# R rows, V vocabulary

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling.gpu_elementary import (
    KEY_OF_MINUS_INFINITY,
    KEY_PADDING,
    divided,
    key_value,
    load_logits,
    mass,
    order_key,
)

PIVOTS = 8
# this far below the greatest logit, a mass is 0
MASS_RANGE = tl.constexpr(29.0)
_PIVOTS = tl.constexpr(PIVOTS)
# passes whose pivots are evenly spaced in value; later ones are evenly spaced in keys, which always ends
_VALUE_PASSES = tl.constexpr(5)
_WIDEST_VALUES = tl.constexpr(64.0)
_LEAST, _GREATEST = tl.constexpr(-(2**62)), tl.constexpr(2**62)


@jit()
def keys_of(
    logits: Any,
    edited: Any,
    is_edited: Any,
    first: Any,
    vocabulary: Any,
    temperature: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """(value, order key) of logits / temperature for the ids from `first` on; padding is below everything."""
    ids = first + tl.arange(0, BLOCK)
    y = load_logits(logits, edited, is_edited, ids, vocabulary, EDITS)
    if temperature != 1.0:
        y = divided(y, temperature)
    return y, tl.where(ids < vocabulary, order_key(y), KEY_PADDING)


@jit()
def lowest_key(maximum: Any, lowest: Any) -> Any:
    """The least key (int64) above that of -inf whose value v has v - maximum >= lowest."""
    low, high = tl.zeros([], tl.int64) + (KEY_OF_MINUS_INFINITY + 1), order_key(maximum).to(tl.int64)
    if lowest > float("-inf"):
        while low < high:
            middle = low + ((high - low) >> 1)
            passes = key_value(middle.to(tl.int32)) - maximum >= lowest
            high = tl.where(passes, middle, high)
            low = tl.where(passes, low, middle + 1)
    return low


@jit()
def _pivots(number: Any, low: Any, high: Any, maximum: Any) -> Any:
    """The pivots (int32 [8]) of pass `number` in (low, high], ascending; in pass 0 the first is `low`."""
    i = tl.arange(0, _PIVOTS)
    if number == 0:
        below = (7 - i).to(tl.float32)
        pivots = tl.maximum(order_key(maximum - (0.5 + 0.25 * below * below)).to(tl.int64), low + 1)
        pivots = tl.where(i == 0, low, pivots)
    else:
        bottom, top = key_value(low.to(tl.int32)), key_value(high.to(tl.int32))
        pivots = low + 1 + (((high - low - 1) * i) >> 3)
        if (number < _VALUE_PASSES) & (top - bottom < _WIDEST_VALUES):
            spaced = order_key(bottom + (top - bottom) * ((i + 1).to(tl.float32) / 9.0)).to(tl.int64)
            pivots = tl.maximum(spaced, low + 1)
    return tl.minimum(pivots, high).to(tl.int32)


@jit()
def add_weights(
    logits: Any,
    edited: Any,
    is_edited: Any,
    begin: Any,
    end: Any,
    vocabulary: Any,
    temperature: Any,
    maximum: Any,
    pivots: Any,
    sums: Any,
    by_mass: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the ids [begin, end) to sums (int64 [16]): the tokens at or above each pivot; if by_mass, then their mass."""
    p0, p1, p2, p3 = tl.load(pivots), tl.load(pivots + 1), tl.load(pivots + 2), tl.load(pivots + 3)
    p4, p5, p6, p7 = tl.load(pivots + 4), tl.load(pivots + 5), tl.load(pivots + 6), tl.load(pivots + 7)
    c0 = tl.zeros([BLOCK], tl.int32)
    c1, c2, c3, c4, c5, c6, c7 = c0, c0, c0, c0, c0, c0, c0
    m0 = tl.zeros([BLOCK], tl.int64)
    m1, m2, m3, m4, m5, m6, m7 = m0, m0, m0, m0, m0, m0, m0
    for first in range(begin, end, BLOCK):
        y, key = keys_of(logits, edited, is_edited, first, vocabulary, temperature, EDITS, BLOCK)
        c0 += (key >= p0).to(tl.int32)
        c1 += (key >= p1).to(tl.int32)
        c2 += (key >= p2).to(tl.int32)
        c3 += (key >= p3).to(tl.int32)
        c4 += (key >= p4).to(tl.int32)
        c5 += (key >= p5).to(tl.int32)
        c6 += (key >= p6).to(tl.int32)
        c7 += (key >= p7).to(tl.int32)
        if by_mass:
            m = mass(y - maximum)
            m0 += tl.where(key >= p0, m, 0)
            m1 += tl.where(key >= p1, m, 0)
            m2 += tl.where(key >= p2, m, 0)
            m3 += tl.where(key >= p3, m, 0)
            m4 += tl.where(key >= p4, m, 0)
            m5 += tl.where(key >= p5, m, 0)
            m6 += tl.where(key >= p6, m, 0)
            m7 += tl.where(key >= p7, m, 0)
    tl.atomic_add(sums, tl.sum(c0, axis=0).to(tl.int64))
    tl.atomic_add(sums + 1, tl.sum(c1, axis=0).to(tl.int64))
    tl.atomic_add(sums + 2, tl.sum(c2, axis=0).to(tl.int64))
    tl.atomic_add(sums + 3, tl.sum(c3, axis=0).to(tl.int64))
    tl.atomic_add(sums + 4, tl.sum(c4, axis=0).to(tl.int64))
    tl.atomic_add(sums + 5, tl.sum(c5, axis=0).to(tl.int64))
    tl.atomic_add(sums + 6, tl.sum(c6, axis=0).to(tl.int64))
    tl.atomic_add(sums + 7, tl.sum(c7, axis=0).to(tl.int64))
    if by_mass:
        tl.atomic_add(sums + 8, tl.sum(m0, axis=0))
        tl.atomic_add(sums + 9, tl.sum(m1, axis=0))
        tl.atomic_add(sums + 10, tl.sum(m2, axis=0))
        tl.atomic_add(sums + 11, tl.sum(m3, axis=0))
        tl.atomic_add(sums + 12, tl.sum(m4, axis=0))
        tl.atomic_add(sums + 13, tl.sum(m5, axis=0))
        tl.atomic_add(sums + 14, tl.sum(m6, axis=0))
        tl.atomic_add(sums + 15, tl.sum(m7, axis=0))


@jit()
def wanted_weight(sums: Any, by_mass: Any, excess: Any, top_k: Any, top_p: Any) -> Any:
    """int64: top_k tokens, or top_p of the mass, of all at or above pivot 0; `excess` mass of these is not kept."""
    count = tl.load(sums, volatile=True)
    total = tl.load(sums + _PIVOTS, volatile=True) - excess
    share = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
    share = tl.minimum(tl.maximum(share, 1), total)
    return tl.where(by_mass, share, tl.minimum(top_k.to(tl.int64), count))


@jit()
def narrowed(
    pivots: Any,
    sums: Any,
    by_mass: Any,
    need: Any,
    low: Any,
    high: Any,
    count_low: Any,
    count_above: Any,
    above: Any,
    LIST: tl.constexpr,
) -> Any:
    """The interval after a pass: (low, high, tokens from low on, tokens above high, weight above high, tokens left).

    Tokens left are those whose list would end the search: all from low on if they are few enough that the list may
    hold everything that top_k keeps, else those in [low, high]. All are int64.
    """
    i = tl.arange(0, _PIVOTS)
    pivot, count = tl.load(pivots + i, volatile=True).to(tl.int64), tl.load(sums + i, volatile=True)
    weight = tl.where(by_mass, tl.load(sums + _PIVOTS + i, volatile=True), count)
    # if top_k drops tokens, pivot 0 has less mass than its sum says; it is reached all the same
    reached = weight >= need
    low = tl.maximum(low, tl.max(tl.where(reached, pivot, _LEAST), axis=0))
    count_low = tl.minimum(count_low, tl.min(tl.where(reached, count, _GREATEST), axis=0))
    high = tl.minimum(high, tl.min(tl.where(reached, _GREATEST, pivot - 1), axis=0))
    count_above = tl.maximum(count_above, tl.max(tl.where(reached, 0, count), axis=0))
    above = tl.maximum(above, tl.max(tl.where(reached, 0, weight), axis=0))
    whole = (by_mass == 0) & (need <= LIST // 2)
    return low, high, count_low, count_above, above, tl.where(whole, count_low, count_low - count_above)


@jit()
def search(
    logits: Any,
    edited: Any,
    is_edited: Any,
    vocabulary: Any,
    temperature: Any,
    maximum: Any,
    low: Any,
    by_mass: Any,
    excess: Any,
    top_k: Any,
    top_p: Any,
    pivots: Any,
    sums: Any,
    passes: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
) -> Any:
    """Narrow [low, key of maximum] until at most LIST tokens are left or it is one key, one program for the row.

    pivots (int32 [8]) and sums (int64 [16]) hold `passes` (0 or 1) passes already. Returns (low, high, tokens above
    high, weight above high, tokens in [low, high], wanted weight, passes), int64.
    """
    high = order_key(maximum).to(tl.int64)
    count_low = tl.zeros([], tl.int64) + vocabulary
    count_above, above, need = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    number = tl.zeros([], tl.int32)
    searching = low <= high
    while searching:
        if number >= passes:
            tl.debug_barrier()  # the last pass has been read
            tl.store(pivots + tl.arange(0, _PIVOTS), _pivots(number, low, high, maximum))
            tl.store(sums + tl.arange(0, 2 * _PIVOTS), tl.zeros([2 * _PIVOTS], tl.int64))
            tl.debug_barrier()
            add_weights(
                logits,
                edited,
                is_edited,
                0,
                vocabulary,
                vocabulary,
                temperature,
                maximum,
                pivots,
                sums,
                by_mass,
                EDITS,
                BLOCK,
            )
            tl.debug_barrier()
        if number == 0:
            need = wanted_weight(sums, by_mass, excess, top_k, top_p)
        low, high, count_low, count_above, above, left = narrowed(
            pivots, sums, by_mass, need, low, high, count_low, count_above, above, LIST
        )
        number += 1
        searching = (left > LIST) & (low < high)
    if (by_mass == 0) & (count_low <= LIST):
        high, count_above, above = order_key(maximum).to(tl.int64), count_above * 0, above * 0
    return low, high, count_above, above, count_low - count_above, need, number


@jit()
def collect(
    logits: Any,
    edited: Any,
    is_edited: Any,
    begin: Any,
    end: Any,
    vocabulary: Any,
    temperature: Any,
    low: Any,
    high: Any,
    keys: Any,
    counter: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Append the keys in [low, high] of the ids [begin, end) to the list, in any order."""
    for first in range(begin, end, BLOCK):
        _, key = keys_of(logits, edited, is_edited, first, vocabulary, temperature, EDITS, BLOCK)
        chosen = (key >= low.to(tl.int32)) & (key <= high.to(tl.int32))
        place = tl.atomic_add(counter + tl.zeros_like(key), 1, mask=chosen)
        tl.store(keys + place, key, mask=chosen)


@jit()
def search_list(key: Any, weight: Any, low: Any, above: Any, high: Any, need: Any) -> Any:
    """(last key kept, weight above it): the greatest key in [low, high] that is reached with a weight of `need`."""
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        reached = above + tl.sum(tl.where(key >= middle.to(tl.int32), weight, 0), axis=0) >= need
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low, above + tl.sum(tl.where(key > low.to(tl.int32), weight, 0), axis=0)


@jit()
def id_of_equal(
    logits: Any,
    edited: Any,
    is_edited: Any,
    vocabulary: Any,
    temperature: Any,
    cut: Any,
    number: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """The id of token `number` (1-based) among those with the key `cut`; there are as many."""
    first, before = 0, tl.zeros([], tl.int32)
    last = tl.zeros([], tl.int32) - 1
    while last < 0:
        _, key = keys_of(logits, edited, is_edited, first, vocabulary, temperature, EDITS, BLOCK)
        equal = (key == cut).to(tl.int32)
        found = tl.sum(equal, axis=0)
        if before + found >= number:
            place = before + tl.cumsum(equal, axis=0)
            hit = (equal != 0) & (place == number)
            last = first + tl.sum(tl.where(hit, tl.arange(0, BLOCK), 0), axis=0)
        before += found
        first += BLOCK
    return last


@jit()
def load_list(keys: Any, count: Any, LIST: tl.constexpr) -> Any:
    places = tl.arange(0, LIST)
    return tl.load(keys + places, mask=places < count, other=KEY_PADDING, volatile=True)
