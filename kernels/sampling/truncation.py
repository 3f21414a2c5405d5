"""CPU kernels: min-p, top-k and top-p, by threshold search in integers, so that the order of additions does not matter.

The total order of a row is (value descending, id ascending); each truncation keeps a prefix of it. Values are compared
through `order_key`, an unsigned integer with the order of the float; probabilities are integers, `mass`.
"""

# V vocabulary, R truncated rows

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from sempre.kernels.intrinsics import float32_bits, inlined
from sempre.kernels.jit import compiled
from sempre.kernels.sampling.elementary import divided, exp32, log32

# probability 1 relative to the most probable token; V * 2**40 stays below 2**63 for every vocabulary
MASS_ONE = np.float32(2.0**40)
# three digits of an order key, most significant first: (shift, bits)
DIGITS = ((21, 11), (10, 11), (0, 10))

_KEY_OF_MINUS_INFINITY = np.uint32(0x007FFFFF)

_LANES = 64
_INFINITY = np.float32(np.inf)
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_SMALLEST_NORMAL = np.float32(2.0**-126)


@inlined
def order_key(x: Any) -> Any:
    """uint32 with the order of the float32 x; both zeros have one key."""
    bits = float32_bits(x + _ZERO)
    sign = np.uint32(np.int32(bits) >> np.int32(31))
    return np.uint32(bits ^ np.uint32(sign | np.uint32(0x80000000)))


@inlined
def mass(difference: Any) -> Any:
    """floor(exp(difference) * 2**40) as int64, for a logit's difference to the greatest one (<= 0)."""
    return np.int64(exp32(difference) * MASS_ONE)


@compiled()
def greatest(x: Any) -> Any:
    """The greatest value of x (float32 [V]); +inf if any is NaN or +inf, -inf if all are."""
    best = np.empty(_LANES, np.float32)
    for lane in range(_LANES):
        best[lane] = _MINUS_INFINITY
    for start in range(0, x.size, _LANES):
        block = x[start : start + _LANES]
        for lane in range(block.size):
            value = block[lane] if block[lane] < _INFINITY else _INFINITY
            best[lane] = value if value > best[lane] else best[lane]
    greatest_of_all = best[0]
    for lane in range(1, _LANES):
        greatest_of_all = max(greatest_of_all, best[lane])
    return greatest_of_all


@compiled()
def prefix_cut(keys: Any, weights: Any, need: Any) -> Any:
    """(key, number): the shortest prefix whose weight is at least `need` (1 <= need <= total weight).

    The prefix consists of the elements above `key`, and of the first `number` of those equal to it, in the order of
    their index. `weights` (int64) are equal where keys are; an empty array means a weight of 1 each.
    """
    digits = np.empty(1 << DIGITS[0][1], np.int64)
    count = keys.size
    counting = weights.size == 0
    kept_keys, kept_weights = np.empty(count, np.uint32), np.empty(weights.size, np.int64)
    for shift, bits in DIGITS:
        mask = np.uint32((1 << bits) - 1)
        digits[:] = 0
        if counting:
            for i in range(count):
                digits[(keys[i] >> np.uint32(shift)) & mask] += 1
        else:
            for i in range(count):
                if weights[i] > 0:
                    digits[(keys[i] >> np.uint32(shift)) & mask] += weights[i]
        digit = np.uint32(mask)
        while need > digits[digit]:
            need -= digits[digit]
            digit -= np.uint32(1)
        kept = 0
        for i in range(count):
            if (keys[i] >> np.uint32(shift)) & mask == digit:
                kept_keys[kept] = keys[i]
                if not counting:
                    kept_weights[kept] = weights[i]
                kept += 1
        keys, weights, count = kept_keys, kept_weights, kept
    each = 1 if counting else weights[0]
    return keys[0], (need + each - 1) // each


@compiled()
def last_id_of_cut(keys: Any, key: Any, number: Any) -> Any:
    """The index of element `number` (1-based) among those equal to `key`."""
    equal = 0
    for i in range(keys.size):
        equal += keys[i] == key
    if equal == number:
        return keys.size - 1
    for i in range(keys.size):
        if keys[i] == key:
            number -= 1
            if number == 0:
                return i
    return -1


@compiled()
def _keep_prefix(x: Any, keys: Any, weights: Any, need: Any) -> None:
    key, number = prefix_cut(keys, weights, need)
    last = last_id_of_cut(keys, key, number)
    for i in range(x.size):
        keep = (keys[i] > key) | ((keys[i] == key) & (i <= last))
        x[i] = x[i] if keep else _MINUS_INFINITY


@compiled()
def _truncate_row(x: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> None:
    for i in range(x.size):
        x[i] = divided(x[i], temperature)
    maximum = greatest(x)
    if not _MINUS_INFINITY < maximum < _INFINITY:
        return  # no distribution: the argmax reports it
    if min_p > _ZERO:
        lowest = log32(max(min_p, _SMALLEST_NORMAL))
        for i in range(x.size):
            x[i] = x[i] if x[i] - maximum >= lowest else _MINUS_INFINITY
    keys = np.empty(x.size, np.uint32)
    allowed = 0
    for i in range(x.size):
        keys[i] = order_key(x[i])
        allowed += keys[i] > _KEY_OF_MINUS_INFINITY
    if 0 < top_k < allowed:
        _keep_prefix(x, keys, np.empty(0, np.int64), top_k)
    if top_p < 1.0:
        weights = np.empty(x.size, np.int64)
        for i in range(x.size):
            weights[i] = mass(x[i] - maximum)
        total = 0
        for i in range(x.size):
            total += weights[i]
        need = np.int64(np.ceil(top_p * np.float64(total)))
        _keep_prefix(x, keys, weights, min(max(need, 1), total))


@compiled(parallel=True)
def truncate_rows(logits: Any, rows: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> None:
    """Divide logits[rows] (of float32 [M, V]) by the temperature and set to -inf what is cut off; rows int64 [R].

    The parameters are arrays [M]: temperature float32 (> 0), top_k int64 (0 off), top_p float64 (1 off), min_p float32
    (0 off).
    """
    for item in prange(rows.size):
        row = rows[item]
        _truncate_row(logits[row], temperature[row], top_k[row], top_p[row], min_p[row])
