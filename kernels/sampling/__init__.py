"""Sampling on logits: the noisy argmax, its truncations, penalties, and log-probabilities.

A token is argmax_v (x_v + g_v): x the processed logits divided by the temperature, g = gumbel(seed, position, v) as
defined in `rng.py`; both and their sum are float32. Temperature 0 is the plain argmax. Ties go to the lowest id. Each
row is computed by itself: its result depends neither on the other rows nor on the number of threads.

`sample` and `logprobs` are for the CPU (`cpu.py`). A GPU keeps the parameters in its own table and never waits for the
host: its sequence of launches, with the same bits, is in `gpu.py`.
"""

# M rows of logits, V vocabulary, R reported rows, k best tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sempre.kernels.lazy_module import LazyModule
from sempre.kernels.sampling.penalties import add_bias, allow_bits, allow_only, apply_penalties, forbid

if TYPE_CHECKING:
    from sempre.kernels.sampling import cpu as _cpu
else:
    _cpu = LazyModule(__name__, "cpu")

__all__ = [
    "RAW_LOGPROBS",
    "Logprobs",
    "Reports",
    "Sampled",
    "SamplingRows",
    "add_bias",
    "allow_bits",
    "allow_only",
    "apply_penalties",
    "candidate_logprobs",
    "forbid",
    "logprobs",
    "sample",
]


class Reports(NamedTuple):
    """What is reported of a row."""

    processed: bool = False
    """of the logits that its token is drawn from, after every step but the noise; else of the raw ones"""
    logits: bool = False
    """logits, instead of log-probabilities"""


RAW_LOGPROBS = Reports()


@dataclass(frozen=True)
class SamplingRows:
    """What `sample` needs to know of each row; arrays [M], made by `SamplingRows.of` with checked dtypes."""

    seeds: npt.NDArray[np.uint64]
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float32]
    truncated: npt.NDArray[np.int64]
    """Indices of the rows that are random and use top_k, top_p or min_p, or whose processed logits are read."""
    temperature_after_truncation: npt.NDArray[np.float32]
    """1 for the truncated rows, whose logits are already divided."""

    @classmethod
    def of(
        cls, *, seeds: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, processed: Any = False
    ) -> SamplingRows:
        """Sequences of M numbers; top_k 0, top_p 1 and min_p 0 are off.

        `processed` rows are left in the logits as their token is drawn from them, without the noise.
        """
        temperatures = np.asarray(temperature, np.float32)
        ks, ps, floors = np.asarray(top_k, np.int64), np.asarray(top_p, np.float64), np.asarray(min_p, np.float32)
        truncates = (temperatures > 0) & ((ks > 0) | (ps < 1.0) | (floors > 0) | np.asarray(processed, np.bool_))
        after = np.where(truncates, np.float32(1), temperatures)
        return cls(np.asarray(seeds, np.uint64), temperatures, ks, ps, floors, np.flatnonzero(truncates), after)


class Sampled(NamedTuple):
    """token_ids int32 [M]; values float32 [M], the winning noisy logits.

    A value of +inf marks a row with NaN or +inf among its logits, -inf one in which no token is allowed: its id is
    meaningless.
    """

    token_ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


class Logprobs(NamedTuple):
    """Columns of token_ids (int32) and logprobs (float32) [R, 1 + k]: the target, then the k best in order.

    ranks int32 [R]: 1 + the number of tokens before the target in the order value descending, id ascending. `valid`
    bool [R] is False for a row without a distribution (NaN, +inf, or only -inf).
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    valid: npt.NDArray[np.bool_]

    def part(self, rows: slice) -> Logprobs:
        """Views of some rows."""
        return Logprobs(self.token_ids[rows], self.logprobs[rows], self.ranks[rows], self.valid[rows])


def _as_array(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            "logits: expected a contiguous float32 CPU tensor [rows, vocabulary], found "
            f"{logits.dtype} {list(logits.shape)} on {logits.device}, strides {logits.stride()}"
        )
    if logits.shape[1] == 0:
        raise ValueError("logits: expected at least one column, found an empty vocabulary")
    array: npt.NDArray[np.float32] = logits.numpy()
    return array


def sample(logits: torch.Tensor, rows: SamplingRows, positions: npt.NDArray[np.int64]) -> Sampled:
    """Sample one token per row of logits [M, V]; truncated rows are overwritten.

    `positions` [M] are the indices, in their sequences, of the tokens that are sampled (0 <= position < 2**32).
    """
    return _cpu.sample(_as_array(logits), rows, positions)


def logprobs(
    logits: torch.Tensor,
    rows: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    num_best: int,
    reports: Reports = RAW_LOGPROBS,
) -> Logprobs:
    """Log-probabilities of targets [R] and of the `num_best` best tokens (-1: all) in logits[rows], rows [R].

    Where `reports` says so, the values are the logits. Raises ValueError when a target is outside the vocabulary.
    """
    array = _as_array(logits)
    vocabulary = array.shape[1]
    if targets.size and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise ValueError(f"targets: expected ids in [0, {vocabulary}), found {targets.min()} … {targets.max()}")
    return _cpu.logprobs(array, rows, targets, vocabulary if num_best < 0 else min(num_best, vocabulary), reports)


def candidate_logprobs(
    logits: torch.Tensor, candidates: npt.NDArray[np.int32], reports: Reports = RAW_LOGPROBS
) -> npt.NDArray[np.float32]:
    """What `logprobs` says of candidates [M, K] in each row of logits [M, V], float32 [M, K]; -inf where the id is -1.

    Raises ValueError when an id is outside the vocabulary, or the rows do not fit.
    """
    array = _as_array(logits)
    num_rows, vocabulary = array.shape
    if candidates.ndim != 2 or candidates.shape[0] != num_rows:
        raise ValueError(f"candidates: expected {num_rows} rows of ids, found the shape {list(candidates.shape)}")
    if candidates.size and not -1 <= candidates.min() <= candidates.max() < vocabulary:
        lowest, highest = candidates.min(), candidates.max()
        raise ValueError(f"candidates: expected ids in [-1, {vocabulary}), found {lowest} … {highest}")
    return _cpu.candidate_logprobs(array, candidates, reports)
