"""The CPU's sampling kernels, in order. M rows of logits, V vocabulary, R reported rows, k best tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sempre.kernels.sampling import Logprobs, Reports, Sampled, SamplingRows
from sempre.kernels.sampling.log_softmax import row_statistics
from sempre.kernels.sampling.noise import CHUNK, best_of_chunks
from sempre.kernels.sampling.truncation import truncate_rows

# rows whose log-probabilities are gathered at a time: bounds the scratch memory when the whole vocabulary is requested
ROWS_AT_A_TIME = 64
KERNELS = (truncate_rows, best_of_chunks, row_statistics)


def sample(logits: npt.NDArray[np.float32], rows: SamplingRows, positions: npt.NDArray[np.int64]) -> Sampled:
    """See the facade; logits [M, V]."""
    if rows.truncated.size:
        truncate_rows(logits, rows.truncated, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    num_rows, vocabulary = logits.shape
    shape = (num_rows, -(-vocabulary // CHUNK))
    values, ids = np.empty(shape, np.float32), np.empty(shape, np.int32)
    best_of_chunks(logits, rows.temperature_after_truncation, rows.seeds, positions, values, ids)
    best = values.argmax(axis=1)  # the first of equals, hence the lowest id
    each = np.arange(num_rows)
    return Sampled(ids[each, best], values[each, best])


def logprobs(
    logits: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    num_best: int,
    reports: Reports,
) -> Logprobs:
    """See the facade; logits [M, V], num_best in [0, V]."""
    result = Logprobs(
        np.empty((rows.size, 1 + num_best), np.int32),
        np.empty((rows.size, 1 + num_best), np.float32),
        np.empty(rows.size, np.int32),
        np.empty(rows.size, np.bool_),
    )
    for start in range(0, rows.size, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        _fill_logprobs(logits, rows[part], targets[part], result.part(part), reports)
    return result


def _fill_logprobs(
    logits: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    out: Logprobs,
    reports: Reports,
) -> None:
    maximum, log_sum = np.empty(rows.size, np.float32), np.empty(rows.size, np.float32)
    best = np.zeros((rows.size, out.token_ids.shape[1] - 1), np.uint64)
    row_statistics(logits, rows, targets, maximum, log_sum, out.ranks, best)
    best.sort(axis=1)
    out.token_ids[:, 0] = targets
    out.token_ids[:, 1:] = (best & np.uint64(0xFFFFFFFF)).astype(np.int32)
    out.valid[:] = np.isfinite(maximum)
    out.logprobs[:] = _reported(logits[rows[:, None], out.token_ids], maximum, log_sum, reports)


def candidate_logprobs(
    logits: npt.NDArray[np.float32], candidates: npt.NDArray[np.int32], reports: Reports
) -> npt.NDArray[np.float32]:
    """See the facade; logits [M, V], candidates [M, K]."""
    rows = np.arange(logits.shape[0])
    maximum, log_sum = np.empty(rows.size, np.float32), np.empty(rows.size, np.float32)
    ranks, best = np.empty(rows.size, np.int32), np.empty((rows.size, 0), np.uint64)
    row_statistics(logits, rows, np.zeros_like(rows), maximum, log_sum, ranks, best)
    values = _reported(logits[rows[:, None], np.maximum(candidates, 0)], maximum, log_sum, reports)
    values[candidates < 0] = -np.inf
    return values


def _reported(
    values: npt.NDArray[np.float32],
    maximum: npt.NDArray[np.float32],
    log_sum: npt.NDArray[np.float32],
    reports: Reports,
) -> npt.NDArray[np.float32]:
    """What is reported of logits [R, k] in rows with these statistics [R]."""
    if reports.logits:
        # a zero has no sign, as in the order of tokens
        return values + np.float32(0)
    with np.errstate(invalid="ignore"):  # rows that are not valid
        return (values - maximum[:, None]) - log_sum[:, None]
