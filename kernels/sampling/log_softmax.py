"""CPU kernel: what the log-probabilities of a row need, for sampled tokens and for prompt tokens alike.

logprob_v = (x_v - max) - log(sum), float32, each step rounded once. `sum` is an integer, the sum of
floor(exp(x_v - max) * 2**40) over the row: exact, so the order of additions does not matter; what the floor drops is
less than 2**-40 per token.
"""

# V vocabulary, R rows that are reported, k best tokens

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from sempre.kernels.jit import compiled
from sempre.kernels.sampling.elementary import log32
from sempre.kernels.sampling.truncation import greatest, last_id_of_cut, mass, order_key, prefix_cut

_INFINITY = np.float32(np.inf)
_MINUS_INFINITY = np.float32(-np.inf)
_MASS_UNIT = np.float32(2.0**-40)


@compiled()
def _collect_best(x: Any, best: Any) -> None:
    """Fill best (uint64 [k]) with (inverted order key, id) of the k best tokens, unsorted."""
    keys = np.empty(x.size, np.uint32)
    for i in range(x.size):
        keys[i] = order_key(x[i])
    lowest, last = np.uint32(0), x.size - 1
    if best.size < x.size:
        lowest, number = prefix_cut(keys, np.empty(0, np.int64), best.size)
        last = last_id_of_cut(keys, lowest, number)
    count = 0
    for i in range(x.size):
        if keys[i] > lowest or (keys[i] == lowest and i <= last):
            best[count] = (np.uint64(np.uint32(~keys[i])) << np.uint64(32)) | np.uint64(i)
            count += 1


@compiled()
def _row_statistics(x: Any, target: Any) -> Any:
    """(max, log of the sum relative to max, rank of target)."""
    maximum = greatest(x)
    if not _MINUS_INFINITY < maximum < _INFINITY:
        return maximum, np.float32(0.0), 0
    total = 0
    for i in range(x.size):
        total += mass(x[i] - maximum)
    value = x[target]
    before = 0
    for i in range(x.size):
        before += x[i] > value
    for i in range(target):
        before += x[i] == value
    return maximum, log32(np.float32(total) * _MASS_UNIT), before + 1


@compiled(parallel=True)
def row_statistics(logits: Any, rows: Any, targets: Any, maximum: Any, log_sum: Any, ranks: Any, best: Any) -> None:
    """Statistics of logits[rows[r]] (of float32 [M, V]) for each r; rows and targets are int64 [R].

    Fills maximum and log_sum (float32 [R]; a maximum that is not finite marks a row without a distribution: +inf for
    NaN or +inf in it, -inf for nothing but -inf), ranks (int32 [R], 1 + the number of tokens before the target in the
    order value descending, id ascending) and best (uint64 [R, k]: order key inverted << 32 | id, unsorted).
    """
    for r in prange(rows.size):
        row = logits[rows[r]]
        maximum[r], log_sum[r], ranks[r] = _row_statistics(row, targets[r])
        if best.shape[1] > 0 and _MINUS_INFINITY < maximum[r] < _INFINITY:
            _collect_best(row, best[r])
