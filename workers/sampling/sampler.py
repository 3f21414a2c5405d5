"""From logits to tokens: the steps of sampling, in order, over a batch of requests."""

# M rows of logits, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sempre.ipc.config import LogprobsMode
from sempre.ipc.messages import ErrorInfo, LogprobRows
from sempre.kernels import sampling
from sempre.kernels.sampling import RAW_LOGPROBS, Logprobs, Reports, SamplingRows
from sempre.workers.sampling.row_error import NoDistribution, RowError
from sempre.workers.sampling.state import SamplingState

Rows = npt.NDArray[np.int64]
Candidates = npt.NDArray[np.int32]


class RowResult(NamedTuple):
    """The token of one row and, if requested, its log-probabilities (one row); or the error of this row alone."""

    token_id: int | None
    logprobs: LogprobRows | None
    error: ErrorInfo | None


def reports_of(mode: LogprobsMode) -> Reports:
    """What the engine's logprobs_mode reports."""
    return Reports(processed=mode.startswith("processed"), logits=mode.endswith("logits"))


def pack_logprobs(logprobs: Logprobs, rows: slice) -> LogprobRows:
    """The wire form of some rows."""
    part = logprobs.part(rows)
    return LogprobRows(
        num_rows=part.token_ids.shape[0],
        width=part.token_ids.shape[1],
        token_ids=part.token_ids.astype("<i4", copy=False).tobytes(),
        logprobs=part.logprobs.astype("<f4", copy=False).tobytes(),
        ranks=part.ranks.astype("<i4", copy=False).tobytes(),
    )


def with_listed(
    packed: LogprobRows, logits: torch.Tensor, row: int, token_ids: list[int], reports: Reports
) -> LogprobRows:
    """Return one packed row with the log-probabilities of more tokens, from logits[row] (of [M, V])."""
    if not token_ids:
        return packed
    rows = np.full(len(token_ids), row, np.int64)
    listed = pack_logprobs(sampling.logprobs(logits, rows, np.asarray(token_ids, np.int64), 0, reports), slice(None))
    return LogprobRows(
        num_rows=1,
        width=packed.width + len(token_ids),
        token_ids=packed.token_ids + listed.token_ids,
        logprobs=packed.logprobs + listed.logprobs,
        ranks=packed.ranks,
        listed_ranks=listed.ranks,
    )


@np.errstate(all="ignore")
def packed_candidates(logits: torch.Tensor, candidates: Candidates, reports: Reports) -> bytes:
    """Log-probabilities of candidates [M, K] in the rows of logits [M, V], on the CPU; packed float32."""
    return sampling.candidate_logprobs(logits, candidates, reports).astype("<f4", copy=False).tobytes()


def check_valid(logprobs: Logprobs) -> None:
    """Raise NoDistribution for the first row that has none."""
    for row in np.flatnonzero(~logprobs.valid).tolist():
        raise NoDistribution(row)


@dataclass(frozen=True)
class _Batch:
    """What depends on the states alone; reused while the batch has the same requests."""

    states: list[SamplingState]
    parameters: SamplingRows
    rewritten: list[int]
    """Rows with any of steps 2 to 7."""
    saved: Rows
    """Rows whose raw logits are reported after sampling has overwritten them."""
    reported: dict[int, Rows]
    """Rows by the number of best log-probabilities they request."""

    @classmethod
    def of(cls, states: list[SamplingState], reports: Reports) -> _Batch:
        params = [state.params for state in states]
        parameters = SamplingRows.of(
            seeds=np.fromiter((state.seed for state in states), np.uint64, len(states)),
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            processed=[reports.processed and p.logprobs is not None for p in params],
        )
        rewritten = [row for row, state in enumerate(states) if state.rewrites_logits]
        overwritten = {*rewritten, *parameters.truncated.tolist()}
        reporting = [row for row, p in enumerate(params) if p.logprobs is not None]
        saved = [] if reports.processed else [row for row in reporting if row in overwritten]
        reported: dict[int, list[int]] = {}
        for row, p in enumerate(params):
            if p.logprobs is not None:
                reported.setdefault(p.logprobs, []).append(row)
        arrays = {k: np.asarray(rows, np.int64) for k, rows in reported.items()}
        return cls(states, parameters, rewritten, np.asarray(saved, np.int64), arrays)


class Sampler:
    """Turns rows of logits into tokens. For each row, in this order:

    1. log-probabilities, if requested, are those of the raw logits (computed last, from a saved copy), or else of the
       processed ones, which are those before step 12 (`Reports`);
    2. allowed_token_ids: everything else becomes -inf;
    3. grammar: every token that would leave it becomes -inf, and so do all ends until it is complete; reasoning
        that has used up its budget is forced to end;
    4. bad_words: the token that would complete one becomes -inf (multi-token words match within the output);
    5. min_tokens: end-of-sequence and stop ids become -inf while the output is shorter, unless a grammar leaves no
       other token;
    6. logit_bias is added;
    7. penalties: repetition (prompt and output), frequency, presence (output);
    8. division by the temperature; temperature 0 ends here, with the argmax;
    9. min_p: keep x - max >= log(min_p);
    10. top_k: keep the first k in the order (value descending, id ascending);
    11. top_p: keep the shortest prefix, in that order, with at least top_p of the remaining mass;
    12. add the noise of (seed, position, id), take the argmax, with ties to the lowest id.

    Finite logits stay finite throughout: what would overflow float32 becomes its largest number. A row's result is a
    function of its logits, its state and its position, not of other rows or the thread count.
    """

    def __init__(self, reports: Reports = RAW_LOGPROBS) -> None:
        self._reports = reports
        self._batch = _Batch.of([], reports)

    @np.errstate(all="ignore")
    def sample(
        self, logits: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]
    ) -> list[RowResult]:
        """Sample one token per row of logits (float32 [M, V], may be overwritten).

        `positions[m]` is the index, in its sequence, of the token that row m samples; the state's tokens before it are
        its history. One state may appear in several rows. Raises ValueError when the lengths do not fit.
        """
        if not logits.shape[0] == len(states) == len(positions):
            raise ValueError(
                f"sample: expected as many states and positions as the {logits.shape[0]} rows of logits, "
                f"found {len(states)} and {len(positions)}"
            )
        if list(states) != self._batch.states:  # compares identities
            self._batch = _Batch.of(list(states), self._reports)
        batch = self._batch
        raw = logits[batch.saved] if batch.saved.size else None
        errors = self._rewrite(logits, positions)
        sampled = sampling.sample(logits, batch.parameters, np.asarray(positions, np.int64))
        for row in np.flatnonzero(~np.isfinite(sampled.values)).tolist():
            errors.setdefault(row, row_error(float(sampled.values[row])))
        if raw is not None:
            logits[batch.saved] = raw
        packed = self._logprobs(logits, sampled.token_ids) if batch.reported else {}
        tokens = sampled.token_ids.tolist()
        return [
            RowResult(None, None, errors[row].info()) if row in errors else RowResult(token, packed.get(row), None)
            for row, token in enumerate(tokens)
        ]

    @np.errstate(all="ignore")
    def prompt_logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_best: int) -> LogprobRows:
        """Log-probabilities of token_ids[m], the prompt token after row m of logits [M, V]; num_best -1: all.

        Nothing processes the logits of a prompt: they are raw. Raises NoDistribution naming the first row that has
        none.
        """
        rows = np.arange(logits.shape[0], dtype=np.int64)
        logprobs = sampling.logprobs(logits, rows, np.asarray(token_ids, np.int64), num_best, self._reports)
        check_valid(logprobs)
        return pack_logprobs(logprobs, slice(None))

    def candidate_logprobs(self, logits: torch.Tensor, candidates: Candidates) -> bytes:
        """Log-probabilities of candidates [M, K] in the rows of logits [M, V]; packed float32."""
        return packed_candidates(logits, candidates, self._reports)

    def _rewrite(self, logits: torch.Tensor, positions: Sequence[int]) -> dict[int, RowError]:
        """Steps 2 to 7; the errors by row."""
        errors: dict[int, RowError] = {}
        for row in self._batch.rewritten:
            values: npt.NDArray[np.float32] = logits[row].numpy()
            if not values.max() < np.inf:  # a mask could hide it
                errors[row] = row_error(np.inf)
                continue
            try:
                self._batch.states[row].process(values, positions[row])
            except RowError as error:
                errors[row] = error
        return errors

    def _logprobs(self, logits: torch.Tensor, token_ids: npt.NDArray[np.int32]) -> dict[int, LogprobRows]:
        packed: dict[int, LogprobRows] = {}
        for num_best, rows in self._batch.reported.items():
            logprobs = sampling.logprobs(logits, rows, token_ids[rows].astype(np.int64), num_best, self._reports)
            for index, row in enumerate(rows.tolist()):
                listed = self._batch.states[row].params.logprob_token_ids
                own = pack_logprobs(logprobs, slice(index, index + 1))
                packed[row] = with_listed(own, logits, row, listed, self._reports)
        return packed


def row_error(value: float) -> RowError:
    if value > 0:
        return RowError("logits", "expected finite values or -inf, found NaN or +inf")
    return RowError(
        "sampling",
        "no token is allowed: allowed_token_ids, structured_outputs, bad_words, min_tokens and logit_bias leave none",
    )
