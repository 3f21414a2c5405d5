"""A step: built by the planner, then in flight until its result is back, and checked."""

from __future__ import annotations

from operator import gt

import msgspec

from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.request import Request
from sempre.engine.scheduling.state_slots import StateAccess
from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import (
    DraftRequest,
    ExecuteStep,
    LogprobRows,
    NewRequest,
    SampledTokens,
    ScheduledRequest,
    StepResult,
)


class PlannedStep:
    """Built by `StepPlanner.plan`, consumed by `Scheduler.update`; entry i of each list belongs to one request.

    It holds the requests themselves, not their ids: an id may finish and be reused while the step runs.
    """

    __slots__ = (
        "budget",
        "drafts",
        "new_requests",
        "num_draft_tokens",
        "prompt_budget",
        "requests",
        "samples",
        "scheduled",
        "step_id",
    )

    def __init__(self, step_id: int, limits: Limits) -> None:
        self.step_id = step_id
        self.budget = limits.max_num_batched_tokens  # remaining tokens
        self.prompt_budget = limits.max_prompt_tokens or self.budget  # for requests that do more than decode
        self.num_draft_tokens = 0  # to verify
        self.requests: list[Request] = []
        self.samples: list[bool] = []
        self.scheduled: list[ScheduledRequest] = []
        self.new_requests: list[NewRequest] = []
        self.drafts: list[DraftRequest] = []

    @property
    def speculates(self) -> bool:
        """Whether drafts are verified in it, or made after it."""
        return self.num_draft_tokens > 0 or bool(self.drafts)

    @property
    def has_room_for_prompts(self) -> bool:
        return self.budget > 0 and self.prompt_budget > 0

    def keep(self, room: int) -> None:
        """Keep room for prompts until `give_back`."""
        self.budget -= room
        self.prompt_budget -= room

    def give_back(self, room: int) -> None:
        """Undo `keep`."""
        self.budget += room
        self.prompt_budget += room

    def add(
        self,
        request: Request,
        num_tokens: int,
        block_table_start: int,
        block_ids: list[int],
        drafts: list[int],
        states: StateAccess,
    ) -> None:
        """Plan the next `num_tokens` tokens of a request and the drafts after them, and count them as computed."""
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == request.num_tokens
        if not samples:
            # Cut here, it has taken all the room: a later prompt would get a few tokens, and wait behind this one.
            self.prompt_budget = 0
        elif num_tokens > 1:
            self.prompt_budget = max(0, self.prompt_budget - request.prompt_cost(start, num_tokens))
        if samples and request.speculation is not None and (num_drafts := request.speculation.num_wanted()):
            self.drafts.append(DraftRequest(request_id=request.request_id, num_drafts=num_drafts))
        if drafts:
            request.drafts_in_flight = drafts
            self.num_draft_tokens += len(drafts)
            end += len(drafts)
        rows_start = 0
        if request.wants_prompt_logprobs:
            rows_start = request.prompt_logprobs_start
            request.prompt_logprobs_start = max(rows_start, min(end, request.num_prompt_tokens - 1) + 1)
        self.scheduled.append(
            ScheduledRequest(
                request_id=request.request_id,
                num_computed_tokens=start,
                num_tokens=end - start,
                block_table_start=block_table_start,
                block_ids=block_ids,
                prompt_logprobs_start=rows_start,
                draft_token_ids=drafts,
                state_read=states.read,
                state_writes=list(states.writes),
            )
        )
        self.requests.append(request)
        self.budget -= end - start
        request.num_computed_tokens = end
        self.samples.append(samples)
        if samples:
            request.num_tokens += 1

    def add_token(self, request: Request, new_block_ids: list[int]) -> None:
        """Like `add`, for a plain request (without states) whose last known token alone is to be computed, after its
        block table has grown by `new_block_ids`."""
        start = request.num_computed_tokens
        self.scheduled.append(
            ScheduledRequest(
                request_id=request.request_id,
                num_computed_tokens=start,
                num_tokens=1,
                block_table_start=len(request.block_ids) - len(new_block_ids),
                block_ids=new_block_ids,
            )
        )
        self.requests.append(request)
        self.samples.append(True)
        self.budget -= 1
        request.num_computed_tokens = start + 1
        request.num_tokens += 1

    def check(self, step: ExecuteStep, result: StepResult) -> None:
        """Raise ProtocolError unless `step` is this one and `result` is complete; changes nothing."""
        if not step.step_id == result.step_id == self.step_id:
            raise ProtocolError(
                f"StepResult.step_id: expected {self.step_id}, the oldest step in flight, "
                f"found {result.step_id} for step {step.step_id}; results must come in the order of the steps"
            )
        if len(result.sampled) != len(self.requests):
            raise ProtocolError(
                f"StepResult.sampled: expected {len(self.requests)} entries in step {self.step_id}, "
                f"found {len(result.sampled)}"
            )
        for index, (request, samples, sampled) in enumerate(
            zip(self.requests, self.samples, result.sampled, strict=True)
        ):
            if sampled.request_id != request.request_id:
                found = f"request {sampled.request_id!r}"
                raise self._refused(index, "request_id", f"request {request.request_id!r}", found)
            if sampled.error is None:
                if samples and request.is_plain and len(sampled.token_ids) == 1 and sampled.pooled is None:
                    continue
                pools = request.spec.pooling is not None
                if (sampled.pooled is not None) != (pools and samples):
                    expected = "what was pooled" if pools and samples else "nothing"
                    raise self._refused(index, "pooled", expected, "nothing" if sampled.pooled is None else "a result")
                if bool(sampled.token_ids) != (samples and not pools):
                    expected = "at least one token" if samples and not pools else "no token"
                    raise self._refused(index, "token_ids", expected, f"{len(sampled.token_ids)} tokens")
                drafts = self.scheduled[index].draft_token_ids
                if sampled.token_ids and not follows_drafts(sampled.token_ids, drafts):
                    expected = f"a beginning of the drafts {drafts} and one token"
                    raise self._refused(index, "token_ids", expected, f"{sampled.token_ids}")
                if request.wants_prompt_logprobs:
                    self._check_prompt_logprobs(index, sampled)
        check_drafts(step, result)

    def _check_prompt_logprobs(self, index: int, sampled: SampledTokens) -> None:
        request, planned = self.requests[index], self.scheduled[index]
        expected = num_prompt_logprob_rows(planned, request.num_prompt_tokens)
        found = num_rows(sampled.prompt_logprobs)
        if found != expected:
            raise self._refused(index, "prompt_logprobs", f"{expected} rows", f"{found} rows")
        given = request.spec.params.prompt_candidates
        if given is not None and sampled.prompt_logprobs is not None:
            num_without = max(0, 1 + given.start - first_scored_token(planned))
            expected = 4 * given.width * max(0, expected - num_without)
            found = len(sampled.prompt_logprobs.candidates)
            if found != expected:
                raise self._refused(index, "prompt_logprobs.candidates", f"{expected} bytes", f"{found} bytes")

    def _refused(self, index: int, field: str, expected: str, found: str) -> ProtocolError:
        return ProtocolError(
            f"StepResult.sampled[{index}].{field}: expected {expected} in step {self.step_id}, found {found}"
        )


def check_drafts(step: ExecuteStep, result: StepResult) -> None:
    """Raise ProtocolError unless `result` has drafts for each request that wanted them, and not too many."""
    expected, found = [item.num_drafts for item in step.drafts], [len(drafts) for drafts in result.drafts]
    if len(found) != len(expected) or any(map(gt, found, expected)):
        raise ProtocolError(
            f"StepResult.drafts: expected {len(expected)} lists of at most {expected} tokens in step {step.step_id}, "
            f"found {len(found)} of {found}"
        )


def follows_drafts(token_ids: list[int], drafts: list[int]) -> bool:
    """Whether a worker may have sampled `token_ids` when it verified `drafts`."""
    num_kept = len(token_ids) - 1
    return num_kept <= len(drafts) and token_ids[:num_kept] == drafts[:num_kept]


def num_rows(rows: LogprobRows | None) -> int:
    return 0 if rows is None else rows.num_rows


def num_prompt_logprob_rows(planned: ScheduledRequest, num_prompt_tokens: int) -> int:
    """Number of rows that a worker reports for one planned chunk, see `ScheduledRequest`."""
    last = min(planned.num_computed_tokens + planned.num_tokens, num_prompt_tokens - 1)
    return max(0, last - first_scored_token(planned) + 1)


def first_scored_token(planned: ScheduledRequest) -> int:
    """The prompt token of the first of these rows."""
    return max(planned.num_computed_tokens + 1, planned.prompt_logprobs_start)


def first_rows(rows: LogprobRows | None, count: int) -> LogprobRows | None:
    """The first `count` rows."""
    if rows is None or rows.num_rows <= count:
        return rows
    num_bytes = 4 * count * rows.width
    return msgspec.structs.replace(
        rows,
        num_rows=count,
        token_ids=rows.token_ids[:num_bytes],
        logprobs=rows.logprobs[:num_bytes],
        ranks=rows.ranks[: 4 * count],
        listed_ranks=rows.listed_ranks[: len(rows.listed_ranks) // rows.num_rows * count],
    )
