"""GPU kernels: an estimate of where a row is cut, so that the first pass of the threshold search is nearly always the
last (see `gpu_truncation.py`). Nothing here affects a result.
"""

# R rows, V vocabulary, G groups of 64 ids

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import gpu_table
from sempre.kernels.sampling.gpu_elementary import divided, error_visible, exp32, load_logits, order_key
from sempre.kernels.sampling.gpu_search import MASS_RANGE, PIVOTS, lowest_key

# ids in a group, of which the estimate knows the greatest logit
GROUP = 64

_FLAGS, _TEMPERATURE = tl.constexpr(gpu_table.FLAGS), tl.constexpr(gpu_table.TEMPERATURE)
_TRUNCATES, _EDITS = tl.constexpr(gpu_table.TRUNCATES), tl.constexpr(gpu_table.EDITS)
_TOP_K, _LOWEST, _TOP_P = (
    tl.constexpr(gpu_table.TOP_K),
    tl.constexpr(gpu_table.LOWEST),
    tl.constexpr(gpu_table.TOP_P),
)
_WORDS = tl.constexpr(gpu_table.WORDS)
_PIVOTS = tl.constexpr(PIVOTS)
_SAMPLE_STEPS = tl.constexpr(13)
_GROUP = tl.constexpr(GROUP)


@jit()
def row_parameters(row: Any, row_slots: Any, table: Any, addresses: Any) -> Any:
    """(flags, temperature, top_k, top_p, lowest) of a row; flags 0 if it does not truncate."""
    slot = tl.load(row_slots + row)
    is_row = slot >= 0
    words = table + slot.to(tl.int64) * _WORDS
    flags = tl.load(words + _FLAGS, mask=is_row, other=0)
    temperature = tl.load(words + _TEMPERATURE, mask=is_row, other=0).to(tl.float32, bitcast=True)
    top_k = tl.load(words + _TOP_K, mask=is_row, other=0)
    lowest = tl.load(words + _LOWEST, mask=is_row, other=0).to(tl.float32, bitcast=True)
    wide = addresses + slot.to(tl.int64) * (_WORDS // 2)
    top_p = tl.load(wide + _TOP_P, mask=is_row, other=0).to(tl.float64, bitcast=True)
    return tl.where((flags & _TRUNCATES) != 0, flags, 0), temperature, top_k, top_p, lowest


@jit()
def is_finite(x: Any) -> Any:
    return (x > float("-inf")) & (x < float("inf"))


@jit()
def group_maxima(
    logits: Any,
    edited: Any,
    row_slots: Any,
    table: Any,
    addresses: Any,
    maxima: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """maxima (float32 [R, G]): the greatest logit of each group of 64, +inf for NaN. BLOCK is a multiple of 64."""
    piece, row = tl.program_id(0), tl.program_id(1)
    flags, _, _, _, _ = row_parameters(row, row_slots, table, addresses)
    if flags == 0:
        return
    start = row.to(tl.int64) * vocabulary
    ids = piece * BLOCK + tl.arange(0, BLOCK)
    x = load_logits(logits + start, edited + start, flags & _EDITS, ids, vocabulary, EDITS)
    greatest = tl.max(tl.reshape(error_visible(x), [BLOCK // _GROUP, _GROUP]), axis=1)
    groups = piece * (BLOCK // _GROUP) + tl.arange(0, BLOCK // _GROUP)
    num_groups = (vocabulary + _GROUP - 1) // _GROUP
    tl.store(maxima + row.to(tl.int64) * num_groups + groups, greatest, mask=groups < num_groups)


@jit()
def place_pivots(
    logits: Any,
    edited: Any,
    row_slots: Any,
    table: Any,
    addresses: Any,
    maxima: Any,
    row_maxima: Any,
    pivots: Any,
    sums: Any,
    list_counters: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLE: tl.constexpr,
) -> None:
    """row_maxima (float32 [R]) of logits / temperature, and the pivots (int32 [R, 8]) of the first pass.

    The weight at or above a threshold is estimated: exactly for the greatest of each group, and for the others from
    SAMPLE groups, spread over the row. Only the number of passes depends on it. GROUPS >= G. Clears sums (int64
    [R, 16]) and list_counters (int32 [R]).
    """
    row = tl.program_id(0)
    flags, temperature, top_k, top_p, lowest = row_parameters(row, row_slots, table, addresses)
    if flags == 0:
        return
    num_groups = (vocabulary + _GROUP - 1) // _GROUP
    groups = tl.arange(0, GROUPS)
    greatest = tl.load(maxima + row.to(tl.int64) * num_groups + groups, mask=groups < num_groups, other=float("-inf"))
    greatest = divided(greatest, temperature)
    maximum = tl.max(greatest, axis=0)
    tl.store(row_maxima + row, maximum)
    tl.store(sums + row * (2 * _PIVOTS) + tl.arange(0, 2 * _PIVOTS), tl.zeros([2 * _PIVOTS], tl.int64))
    tl.store(list_counters + row, 0)
    if is_finite(maximum):
        start = row.to(tl.int64) * vocabulary
        stride = tl.maximum(num_groups // SAMPLE, 1)
        ids = tl.arange(0, SAMPLE)[:, None] * (_GROUP * stride) + tl.arange(0, _GROUP)[None, :]
        x = load_logits(logits + start, edited + start, flags & _EDITS, ids, vocabulary, EDITS)
        y = divided(tl.where(x == tl.max(x, axis=1)[:, None], float("-inf"), x), temperature)
        y = tl.reshape(y, [SAMPLE * _GROUP])
        by_mass = top_k == 0
        scale = num_groups.to(tl.float32) / SAMPLE
        others = scale * tl.where(by_mass, exp32(y - maximum), tl.where(y > float("-inf"), 1.0, 0.0))
        best = tl.where(by_mass, exp32(greatest - maximum), tl.where(greatest > float("-inf"), 1.0, 0.0))
        total = tl.sum(best, axis=0) + tl.sum(others, axis=0)
        wanted = tl.where(by_mass, total * top_p.to(tl.float32), top_k.to(tl.float32))
        bottom, top = maximum - 64.0, maximum
        for _ in range(_SAMPLE_STEPS):
            middle = (bottom + top) * 0.5
            weight = tl.sum(tl.where(greatest >= middle, best, 0.0), axis=0)
            weight += tl.sum(tl.where(y >= middle, others, 0.0), axis=0)
            reached = weight >= wanted
            bottom, top = tl.where(reached, middle, bottom), tl.where(reached, top, middle)
        i = tl.arange(0, _PIVOTS)
        distance = tl.abs(i - 4)
        near, middle, far = tl.where(by_mass, 0.04, 0.1), tl.where(by_mass, 0.2, 0.4), tl.where(by_mass, 1.2, 1.5)
        offset = tl.where(distance == 1, near, tl.where(distance == 2, middle, far))
        offset = tl.where(distance == 0, 0.0, tl.where(i < 4, -offset, offset))
        low = lowest_key(maximum, lowest)
        low = tl.where(by_mass, tl.maximum(low, order_key(maximum - MASS_RANGE).to(tl.int64)), low)
        pivot = tl.maximum(order_key(bottom + offset).to(tl.int64), low + 1)
        pivot = tl.minimum(tl.where(i == 0, low, pivot), order_key(maximum).to(tl.int64))
        tl.store(pivots + row * _PIVOTS + i, pivot.to(tl.int32))
