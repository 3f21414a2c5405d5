"""Continuous batching: plans the next step and applies results. planner.py decides which request computes what.

After a crash of the worker, the requests in flight run alone first, see crash_isolation.py.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from math import inf

import msgspec

from sempre.engine.scheduling.crash_isolation import CrashIsolation, crashed
from sempre.engine.scheduling.kv_cache_manager import KVCacheManager
from sempre.engine.scheduling.kv_events import KVEvents
from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.planned_step import PlannedStep, first_rows, num_rows
from sempre.engine.scheduling.planner import StepPlanner
from sempre.engine.scheduling.prefix_cache import BlockKey
from sempre.engine.scheduling.request import Request
from sempre.engine.scheduling.state_slots import StateSlots
from sempre.engine.scheduling.stats import SchedulerStats
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.config import SchedulingPolicy
from sempre.ipc.error_info import describe
from sempre.ipc.errors import ProtocolError, RequestError
from sempre.ipc.messages import (
    NOT_READY,
    ErrorInfo,
    ExecuteStep,
    RequestOutputDelta,
    RequestSpec,
    SampledTokens,
    ScheduledRequest,
    StepResult,
)


class Scheduler:
    """All requests of one replica.

    `schedule` may be called again before `update` of the previous step: each sampling request in flight counts as one
    token, and a step is never planned past a request's last possible token. A request with a grammar skips a step while
    its token is in flight; the others continue. While a request needs the result of a step in flight to draft, none is
    planned ahead: it would run at half the speed of the others, and they without it. Steps are updated in planning
    order.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        policy: SchedulingPolicy,
        enable_prefix_caching: bool,
        max_request_crashes: int = 3,
        speculation: SpeculationPlan | None = None,
        kv_events: KVEvents | None = None,
    ) -> None:
        self._limits = limits
        self._speculation = speculation
        self._uses_priority = policy == "priority"
        self._requests: dict[str, Request] = {}
        self._counters = SchedulerStats()
        self._states: StateSlots | None = None
        if limits.num_state_slots:
            self._states = StateSlots(
                num_slots=limits.num_state_slots,
                max_num_seqs=limits.max_num_seqs,
                block_size=limits.block_size,
                takes_snapshots=enable_prefix_caching,
            )
        self._kv_cache = KVCacheManager(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            enable_prefix_caching=enable_prefix_caching,
            states=self._states,
            events=kv_events,
        )
        self._planner = StepPlanner(limits, self._kv_cache, self._counters)
        self._in_flight: deque[PlannedStep] = deque()
        self._asking: list[Request] = []
        self._isolation = CrashIsolation(max_request_crashes)
        self._finished_ids: list[str] = []  # known to the worker, which is told with the next step
        self._next_step_id = 0

    # Adding and aborting requests

    def add(self, spec: RequestSpec) -> None:
        """Queue a request. Raises RequestError if its id is in use or it can never run."""
        if spec.request_id in self._requests:
            message = f"The request id {spec.request_id!r} belongs to an unfinished request; choose another one."
            raise RequestError(message, parameter="request_id", value=spec.request_id, request_id=spec.request_id)
        self._limits.check_prompt(spec)
        self._limits.check_adapter(spec)
        speculation = None
        # a grammar needs known tokens, one at a time
        if self._speculation is not None and not spec.params.depends_on_output:
            speculation = self._speculation.start(spec.cache_salt)
        request = Request(spec, spec.priority if self._uses_priority else 0, self._limits, speculation)
        if request.num_tokens > request.compute_limit:
            length, limit = request.num_tokens, request.compute_limit
            message = f"output_token_ids: the sequence has {length} tokens; the maximum to continue is {limit}."
            raise RequestError(message, parameter="output_token_ids", value=length, request_id=spec.request_id)
        self._requests[spec.request_id] = request
        self._planner.wait(request)

    def num_cached_tokens(self, spec: RequestSpec, keys: list[BlockKey]) -> int:
        """How long a prefix of a new request is cached; see `KVCacheManager`."""
        return self._kv_cache.num_cached_tokens(spec, keys)

    def abort(self, request_id: str, finish_reason: str = "abort") -> RequestOutputDelta | None:
        """End a request now and drop its results in flight. None if the id is unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = finish_reason
        self._retire(request)
        return RequestOutputDelta(
            request_id=request_id, finish_reason=finish_reason, num_cached_tokens=request.cached_tokens_to_report
        )

    def pause(self, request_id: str) -> None:
        """Plan no more steps of a request until `resume`; it keeps its tokens, but no blocks. Ignores unknown ids."""
        request = self._requests.get(request_id)
        if request is not None and not request.is_paused:
            self._planner.pause(request)
            self._isolation.release(request)

    def resume(self, request_id: str) -> None:
        """Continue a paused request; ignores others."""
        request = self._requests.get(request_id)
        if request is not None and request.is_paused:
            self._planner.resume(request)

    def has_unfinished(self) -> bool:
        """Whether a request is unfinished and not paused."""
        return len(self._requests) > self._planner.num_paused

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    # Planning a step

    def schedule(self, now: float = inf) -> ExecuteStep | None:
        """Plan the next step; None if there is nothing to compute before the next add or update.

        `now` decides whether requests still wait for a draft worker; with `inf` they do not.
        """
        if self._in_flight and self._waits_for_drafts(now):
            return None
        step = self._planner.plan(self._next_step_id, self._isolation.current, now)
        if not step.scheduled:
            return None
        self._next_step_id += 1
        self._counters.num_steps += 1
        self._in_flight.append(step)
        finished_ids, self._finished_ids = self._finished_ids, []
        return ExecuteStep(
            step_id=step.step_id,
            finished_request_ids=finished_ids,
            new_requests=step.new_requests,
            scheduled=step.scheduled,
            drafts=step.drafts,
        )

    def _waits_for_drafts(self, now: float) -> bool:
        """Whether the next step depends on the result of one in flight, for a request to draft."""
        speculation = self._speculation
        may_draft = speculation is not None and (speculation.may_draft or any(s.speculates for s in self._in_flight))
        return may_draft and self._planner.waits_for_drafts(now)

    def take_asking(self) -> list[Request]:
        """Requests that want drafts from a draft worker since the last call."""
        asking, self._asking = self._asking, []
        return asking

    # Applying a result

    def record_time(self, step: ExecuteStep, result: StepResult, now: float) -> None:
        """The workers answered the step `now`, seconds of a steady clock: speculation measures what it costs."""
        if self._speculation is not None:
            self._speculation.observe(step, result.sampled, now)

    def update(self, step: ExecuteStep, result: StepResult) -> list[RequestOutputDelta]:
        """Append sampled tokens, end finished requests, and return the deltas in the order of the step.

        Raises ProtocolError, changing nothing, if `result` does not match the oldest step in flight.
        """
        if not self._in_flight:
            raise ProtocolError(f"StepResult.step_id: expected no result, no step is in flight, found {result.step_id}")
        in_flight = self._in_flight[0]
        in_flight.check(step, result)
        self._in_flight.popleft()
        deltas = []
        num_prompt_tokens, num_generated = 0, self._counters.generation_tokens
        has_suspects = bool(self._isolation)
        drafted = dict(zip((item.request_id for item in in_flight.drafts), result.drafts, strict=True))
        for request, planned, sampled in zip(in_flight.requests, in_flight.scheduled, result.sampled, strict=True):
            if request.num_prompt_tokens_counted < request.num_prompt_tokens:
                num_prompt_tokens += request.count_prompt_tokens(planned.num_computed_tokens + planned.num_tokens)
            if request.finish_reason is not None:
                continue  # aborted or stopped while this step was in flight
            holds_blocks = request.is_running and request.admitted_at_step <= in_flight.step_id
            if sampled.error is not None:
                if sampled.error.type == NOT_READY:
                    self._compute_again(request, planned, holds_blocks)
                    continue
                request.finish_reason = "error"
                deltas.append(self._ended_by_error(request, sampled.error))
                continue
            num_written = planned.num_computed_tokens + planned.num_tokens
            if planned.draft_token_ids:
                num_written -= self._count_rejected(request, planned.draft_token_ids, sampled)
                if holds_blocks:
                    request.num_computed_tokens = num_written
            if self._states is not None and holds_blocks and sampled.token_ids:
                self._states.decide(request, num_written)
            if holds_blocks and num_written >= request.next_commit_at:
                self._kv_cache.commit(request, num_written, sampled.token_ids)
            if sampled.pooled is not None:
                deltas.append(self._pooled(request, sampled.pooled))
            elif sampled.token_ids or sampled.prompt_logprobs is not None:
                deltas.append(self._apply(request, sampled, planned, drafted.get(request.request_id)))
            if has_suspects and self._isolation.has_passed(request):
                # the next suspect runs alone; this one continues after the last
                self._isolation.release(request)
                if request.is_running:
                    self._planner.wait_again(request)
        self._counters.tokens_per_step.observe(num_prompt_tokens + self._counters.generation_tokens - num_generated)
        return deltas

    def _compute_again(self, request: Request, planned: ScheduledRequest, holds_blocks: bool) -> None:
        """The worker could not sample yet: recompute the last known token in the next step."""
        request.num_tokens -= 1
        if request.wants_prompt_logprobs:
            # they depend on hidden states of this step, which are gone
            request.prompt_logprobs_start = planned.prompt_logprobs_start
            if holds_blocks:
                self._planner.wait_again(request)
        elif holds_blocks and request.slots is not None and not request.slots.undecided:
            # there was no slot to keep the state before it
            self._planner.wait_again(request)
        elif holds_blocks:
            request.num_computed_tokens = request.num_tokens - 1
            if self._states is not None:
                self._states.decide(request, request.num_computed_tokens)

    def _count_rejected(self, request: Request, drafts: list[int], sampled: SampledTokens) -> int:
        """Count accepted and rejected drafts; return how many were rejected, whose keys and values are invalid."""
        request.drafts_in_flight = []
        num_kept = len(sampled.token_ids) - 1
        counters = self._counters
        counters.num_drafts += 1
        counters.num_draft_tokens += len(drafts)
        counters.num_accepted_tokens += num_kept
        per_position = counters.num_accepted_tokens_per_pos
        per_position += [0] * (num_kept - len(per_position))
        for index in range(num_kept):
            per_position[index] += 1
        return len(drafts) - num_kept

    def _apply(
        self, request: Request, sampled: SampledTokens, planned: ScheduledRequest, drafted: list[int] | None
    ) -> RequestOutputDelta:
        """Append one request's tokens up to the first that ends it. `drafted`: new draft tokens, if requested."""
        token_ids, logprobs = sampled.token_ids, sampled.logprobs
        ended = False
        if len(token_ids) == 1:
            ended = request.append(token_ids[0])
            if not ended and request.is_plain and not request.cached_tokens_to_report:
                self._counters.generation_tokens += 1
                return RequestOutputDelta(request_id=request.request_id, token_ids=token_ids, logprobs=logprobs)
        elif (count := request.append_all(token_ids)) is not None:
            ended = True
            token_ids, logprobs = token_ids[:count], first_rows(logprobs, count)
        if token_ids:
            request.num_tokens += len(token_ids) - 1  # one was counted when the step was planned
            self._counters.generation_tokens += len(token_ids)
        if sampled.prompt_logprobs is not None:
            request.num_prompt_logprobs_delivered += num_rows(sampled.prompt_logprobs)
        if request.speculation is not None and token_ids and not ended:
            request.speculation.sampled(request.token_ids, planned.draft_token_ids, len(token_ids) - 1, drafted)
            if request.speculation.num_to_ask():
                self._asking.append(request)
        num_cached_tokens, request.cached_tokens_to_report = request.cached_tokens_to_report, 0
        error = None
        if ended:
            self._retire(request)
            if request.finish_reason == "error":
                error = self._limits.outgrown(request.request_id, len(request.token_ids))
        return RequestOutputDelta(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=sampled.prompt_logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=num_cached_tokens,
            error=error,
        )

    def _pooled(self, request: Request, pooled: bytes) -> RequestOutputDelta:
        """The end of a request whose prompt has been pooled."""
        request.finish_reason = "stop"
        self._retire(request)
        return RequestOutputDelta(
            request_id=request.request_id,
            finish_reason="stop",
            num_cached_tokens=request.cached_tokens_to_report,
            pooled=pooled,
        )

    def _ended_by_error(self, request: Request, error: ErrorInfo) -> RequestOutputDelta:
        self._retire(request)
        return RequestOutputDelta(
            request_id=request.request_id,
            finish_reason="error",
            num_cached_tokens=request.cached_tokens_to_report,
            error=error,
        )

    def _retire(self, request: Request) -> None:
        """Remove a finished request from all structures."""
        assert request.finish_reason is not None
        if request.speculation is not None:
            request.speculation.ended(request.token_ids, request.num_prompt_tokens)
        self._planner.leave(request)
        self._isolation.release(request)
        del self._requests[request.request_id]
        if request.is_known_to_worker:
            self._finished_ids.append(request.request_id)
        self._counters.finished[request.finish_reason] += 1
        self._counters.preemptions_per_request.observe(request.num_preemptions)

    # Restart and statistics

    def restart(self, cause: str) -> list[RequestOutputDelta]:
        """The worker died from `cause`; its successor has no state, so every unfinished request waits again.

        Steps in flight are lost; do not pass their results to `update`. Requests that were in flight in too many
        crashes end here with an error.
        """
        guilty = self._isolation.note_crash(self._in_flight)
        self.forget_computed()
        self._counters.num_worker_restarts += 1
        return [self._given_up(request, num_crashes, cause) for request, num_crashes in guilty]

    def forget_computed(self) -> None:
        """The workers have no state any more, and no step is in flight: every unfinished request waits again, with its
        tokens."""
        if self._speculation is not None:
            self._speculation.forget_times()
        for request in self._requests.values():
            request.lose_worker()
        self._planner.restart(self._requests.values())
        self._in_flight.clear()
        self._finished_ids.clear()

    def _given_up(self, request: Request, num_crashes: int, cause: str) -> RequestOutputDelta:
        request.finish_reason = "error"
        return self._ended_by_error(request, describe(crashed(request, num_crashes, cause)))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks. While a request holds blocks, do nothing and return False."""
        if self._planner.running:
            return False
        self._kv_cache.forget_cached()
        return True

    def progress(self) -> dict[str, tuple[int, int]]:
        """(known tokens, computed tokens) of each running request; if none runs, of the next one."""
        requests = self._planner.running or list(islice(self._planner.waiting, 1))
        return {request.request_id: (len(request.token_ids), request.num_computed_tokens) for request in requests}

    def stats(self) -> SchedulerStats:
        """A snapshot, except for the observations, which keep changing."""
        suspect = self._isolation.current
        # while a suspect runs, no other request may
        num_deferred = sum(
            suspect not in (None, request) or request.awaits_result or not self._planner.has_adapter_slot(request)
            for request in self._planner.waiting
        )
        return msgspec.structs.replace(
            self._counters,
            num_running=len(self._planner.running),
            num_waiting=len(self._planner.waiting),
            num_deferred=num_deferred,
            kv_cache_usage=self._kv_cache.usage,
            num_accepted_tokens_per_pos=self._counters.num_accepted_tokens_per_pos.copy(),
            finished=self._counters.finished.copy(),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError unless queues, block tables, pool and prefix cache agree."""
        assert len(self._planner.running) + len(self._planner.waiting) + self._planner.num_paused == len(self._requests)
        assert all(request.finish_reason is None for request in self._requests.values())
        self._planner.check_invariants()
