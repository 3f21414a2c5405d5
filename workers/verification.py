"""Verification of draft tokens: which of the tokens sampled after them are accepted.

The row after a draft token is sampled as if that token had been sampled. Its token is accepted when that is the case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from sempre.ipc.messages import LogprobRows, SampledTokens
from sempre.workers.input_batch import StepPlan
from sempre.workers.sampling import RowResult


@contextmanager
def drafts_in_place(plan: StepPlan) -> Iterator[None]:
    """In this context, the step's sequences end with their draft tokens, so that rows see them as history."""
    drafted = [
        (state, len(state.token_ids), item.draft_token_ids)
        for state, item in zip(plan.states, plan.scheduled, strict=True)
        if item.draft_token_ids
    ]
    for state, _, draft_token_ids in drafted:
        state.token_ids += draft_token_ids
    try:
        yield
    finally:
        for state, length, _ in drafted:
            state.sampling.rewind(length)
            del state.token_ids[length:]


def verified(request_id: str, drafts: Sequence[int], rows: Sequence[RowResult], rank: int) -> SampledTokens:
    """The accepted tokens of `rows` (one after the last known token, one after each draft): at least one, or an error.

    A later row's error is left to the next step: without drafts it would have come after these tokens, too.
    """
    kept: list[RowResult] = []
    for row, draft in zip(rows, [*drafts, None], strict=True):
        if row.token_id is None:
            break
        kept.append(row)
        if row.token_id != draft:
            break
    if not kept:
        error = rows[0].error
        assert error is not None, "a row that samples has a token or an error"
        return SampledTokens(request_id=request_id, error=replace(error, rank=rank))
    token_ids = [row.token_id for row in kept if row.token_id is not None]
    parts = [row.logprobs for row in kept if row.logprobs is not None]
    return SampledTokens(request_id=request_id, token_ids=token_ids, logprobs=joined(parts) if parts else None)


def joined(parts: Sequence[LogprobRows]) -> LogprobRows:
    """The rows of all parts, which have equal widths, in order."""
    if len(parts) == 1:
        return parts[0]
    return LogprobRows(
        num_rows=sum(part.num_rows for part in parts),
        width=parts[0].width,
        token_ids=b"".join(part.token_ids for part in parts),
        logprobs=b"".join(part.logprobs for part in parts),
        ranks=b"".join(part.ranks for part in parts),
        listed_ranks=b"".join(part.listed_ranks for part in parts),
        candidates=b"".join(part.candidates for part in parts),
    )
