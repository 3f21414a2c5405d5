"""Continuous batching: decides which request computes what in the next step, and applies what came back.

Order is (priority, ordinal, request id), lower first; the priority counts only under the policy "priority".
One step takes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests, and at most
`max_prompt_tokens` of them are of prompts, since whoever decodes waits for those:

1. running requests, in order; one that needs a block when none is left preempts the last running request, or itself;
2. then, if nobody was preempted, waiting requests, in order, while the first of them fits. None overtakes another.

After a crash of the worker the requests that were at work run alone first, see quarantine.py.

A preempted request gives its blocks back and waits again at its place in the order; what it had computed is
computed again. None of this shows in a request's tokens: they depend on its own prompt, parameters and seed alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter

import msgspec

from sempre.engine.scheduling.kv_cache_manager import KVCacheManager
from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.quarantine import Quarantine
from sempre.engine.scheduling.request import OrderKey, Request
from sempre.engine.scheduling.stats import SchedulerStats
from sempre.engine.scheduling.step_in_flight import StepInFlight, first_rows, num_rows
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.error_info import describe
from sempre.ipc.errors import ConfigError, ProtocolError, RequestCrashed, RequestError
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

ORDER_KEY = attrgetter("order_key")


class Scheduler:
    """All requests of one replica.

    `schedule` may be called again before `update` for the former step: what is in flight is counted as one token per
    sampling request, and a step is never planned past a request's last possible token. A request with a grammar sits a
    step out while its token is in flight; the others go on. Steps are updated in the order
    in which they were scheduled.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str,
        enable_prefix_caching: bool,
        max_request_crashes: int = 3,
        speculation: SpeculationPlan | None = None,
        max_draft_tokens: int = 0,
        max_prompt_tokens: int | None = None,
    ) -> None:
        """`max_draft_tokens` bounds the guesses in one step; without `max_prompt_tokens` prompts may fill it.

        Raises ConfigError for a size below 1 or an unknown policy.
        """
        sizes = {
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_prompt_tokens": max_num_batched_tokens if max_prompt_tokens is None else max_prompt_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} must be at least 1, got {size}.", parameter=name, value=size)
        if policy not in ("fcfs", "priority"):
            message = f"scheduling_policy must be 'fcfs' or 'priority', got {policy!r}."
            raise ConfigError(message, parameter="scheduling_policy", value=policy)
        self._limits = Limits(max_model_len, num_blocks, block_size)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_tokens = sizes["max_prompt_tokens"]
        self._speculation = speculation
        self._max_draft_tokens = max_draft_tokens
        self._uses_priority = policy == "priority"
        self._kv_cache = KVCacheManager(
            num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching
        )
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # sorted by order key, as is _waiting
        self._waiting: list[Request] = []
        self._in_flight: deque[StepInFlight] = deque()
        self._awaiting_drafts: list[Request] = []
        self._quarantine = Quarantine(max_request_crashes)
        self._finished_ids: list[str] = []  # known to the worker, to be told with the next step
        self._next_step_id = 0
        self._counters = SchedulerStats()

    # Requests come and go

    def add(self, spec: RequestSpec) -> None:
        """Queue a request. Raises RequestError when its id is in use or it can never run."""
        if spec.request_id in self._requests:
            message = f"The request id {spec.request_id!r} belongs to an unfinished request; choose another one."
            raise RequestError(message, parameter="request_id", value=spec.request_id, request_id=spec.request_id)
        self._limits.check_prompt(spec)
        speculation = None
        # a grammar follows tokens that are certain, one at a time
        if self._speculation is not None and not spec.params.depends_on_output:
            speculation = self._speculation.start(spec.cache_salt)
        request = Request(spec, spec.priority if self._uses_priority else 0, self._limits, speculation)
        if request.num_tokens > request.compute_limit:
            length, limit = request.num_tokens, request.compute_limit
            message = f"output_token_ids: the sequence has {length} tokens, and at most {limit} can go on."
            raise RequestError(message, parameter="output_token_ids", value=length, request_id=spec.request_id)
        self._requests[spec.request_id] = request
        insort(self._waiting, request, key=ORDER_KEY)

    def abort(self, request_id: str, finish_reason: str = "abort") -> RequestOutputDelta | None:
        """End a request now; what is in flight for it is dropped. None if the id is unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = finish_reason
        self._retire(request)
        return RequestOutputDelta(
            request_id=request_id, finish_reason=finish_reason, num_cached_tokens=request.cached_tokens_to_report
        )

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    # A step is planned

    def schedule(self) -> ExecuteStep | None:
        """Plan the next step; None when there is nothing to compute before the next add or update."""
        draft = StepInFlight(self._next_step_id, self._max_num_batched_tokens, self._max_prompt_tokens)
        suspect = self._quarantine.current
        if suspect is None:
            if self._schedule_running(draft):
                self._schedule_waiting(draft)
        elif suspect.is_running:
            self._schedule_running(draft)  # nobody else is running
        else:
            self._admit(draft, suspect)
        if not draft.scheduled:
            return None
        self._next_step_id += 1
        self._counters.num_steps += 1
        self._in_flight.append(draft)
        finished_ids, self._finished_ids = self._finished_ids, []
        return ExecuteStep(
            step_id=draft.step_id,
            finished_request_ids=finished_ids,
            new_requests=draft.new_requests,
            scheduled=draft.scheduled,
            drafts=draft.drafts,
        )

    def _schedule_running(self, draft: StepInFlight) -> bool:
        """Plan running requests; False if one was preempted, so that nobody takes the blocks it waits for."""
        running = self._running
        num_running = len(running)
        # preemption removes from the end only, behind the request in hand, or that one itself
        for index, request in enumerate(running):
            if not draft.budget:
                break
            start = request.num_computed_tokens
            num_new = min(request.num_tokens, request.compute_limit) - start
            if num_new < 1 or request.is_held_back:
                continue  # its last token is in flight
            if request.speculation is not None and self._must_wait(request):
                continue
            if num_new > 1:
                # a long prompt leaves a token to each request behind it: they go on decoding meanwhile
                num_new = min(num_new, draft.prompt_budget, max(1, draft.budget - (num_running - index - 1)))
                if not num_new:
                    continue
            block_table_start = len(request.block_ids)
            block_ids: list[int] = []
            if start + num_new > request.num_slots:
                grown = self._grow_or_preempt(request, start + num_new)
                if grown is None:
                    break
                block_ids = grown
            drafts: list[int] = []
            if request.speculation is not None and request.num_tokens == len(request.token_ids) == start + num_new:
                room = draft.budget - num_new - (num_running - index - 1)
                drafts, more_blocks = self._drafts(request, min(room, self._max_draft_tokens - draft.num_draft_tokens))
                block_ids = block_ids + more_blocks
            draft.plan(request, num_new, block_table_start, block_ids, drafts)
        return len(running) == num_running

    def _must_wait(self, request: Request) -> bool:
        """Whether what its next step computes depends on something still to come."""
        assert request.speculation is not None
        num_in_flight = request.num_tokens - len(request.token_ids)
        return bool(request.drafts_in_flight) or request.speculation.must_wait(request.token_ids, num_in_flight)

    def _drafts(self, request: Request, room: int) -> tuple[list[int], list[int]]:
        """Guesses to verify behind the request's last token, and blocks for them; nobody is preempted for a guess."""
        assert request.speculation is not None
        room = min(room, request.compute_limit - request.num_tokens)
        drafts = request.speculation.drafts(request.token_ids, max(0, room))
        block_ids: list[int] | None = []
        if request.num_tokens + len(drafts) > request.num_slots:
            block_ids = self._kv_cache.grow(request, request.num_tokens + len(drafts))
        if block_ids is None:
            drafts, block_ids = drafts[: request.num_slots - request.num_tokens], []
        return drafts, block_ids

    def _grow_or_preempt(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for the first `num_tokens` tokens, at the cost of the last requests; None if that was this one."""
        while (block_ids := self._kv_cache.grow(request, num_tokens)) is None:
            victim = self._running[-1]
            self._wait_again(victim)
            self._counters.num_preemptions += 1
            victim.num_preemptions += 1
            if victim is request:
                return None
        return block_ids

    def _release_suspect(self, request: Request) -> None:
        """It has passed: the next one runs alone, and its own turn comes again after the last."""
        self._quarantine.release(request)
        if request.is_running:
            self._wait_again(request)

    def _schedule_waiting(self, draft: StepInFlight) -> None:
        """Admit waiting requests, strictly in order."""
        while self._waiting and len(self._running) < self._max_num_seqs and draft.has_room_for_prompts:
            if not self._admit(draft, self._waiting[0]):
                break

    def _admit(self, draft: StepInFlight, request: Request) -> bool:
        """Plan the first tokens of a waiting request; False when it does not fit now."""
        if request.awaits_result:
            return False  # preempted while its last token or drafts were in flight
        cached_blocks = self._kv_cache.find_cached_blocks(request)
        if not self._kv_cache.can_admit(request, cached_blocks):
            return False
        num_cached = len(cached_blocks) * self._kv_cache.block_size
        num_new = min(request.num_tokens - num_cached, draft.budget, draft.prompt_budget)
        self._kv_cache.admit(request, cached_blocks, num_cached + num_new)
        self._count_admission(request, num_cached)
        key: OrderKey = request.order_key
        del self._waiting[bisect_left(self._waiting, key, key=ORDER_KEY)]
        insort(self._running, request, key=ORDER_KEY)
        request.is_running = True
        request.admitted_at_step = draft.step_id
        if not request.is_known_to_worker:
            request.is_known_to_worker = True
            draft.new_requests.append(request.as_new())
        draft.plan(request, num_new, 0, request.block_ids.copy())
        return True

    def take_awaiting_drafts(self) -> list[Request]:
        """Requests that have begun to await guesses since the last call; they are not planned until they have them."""
        awaiting, self._awaiting_drafts = self._awaiting_drafts, []
        return awaiting

    def _count_admission(self, request: Request, num_cached: int) -> None:
        counters = self._counters
        if self._kv_cache.enable_prefix_caching and request.reads_prefix_cache:
            counters.prefix_cache_queries += len(request.token_ids)
            counters.prefix_cache_hits += num_cached
        if not request.was_admitted:
            request.was_admitted = True
            request.cached_tokens_to_report = num_cached
            counters.prompt_tokens += request.num_prompt_tokens
            counters.cached_prompt_tokens += num_cached

    # A result is applied

    def update(self, step: ExecuteStep, result: StepResult) -> list[RequestOutputDelta]:
        """Append what was sampled, end what is done, and tell what is new, in the order of the step.

        Raises ProtocolError, with nothing changed, when `result` does not answer the oldest step in flight.
        """
        if not self._in_flight:
            raise ProtocolError(f"StepResult.step_id: expected no result, no step is in flight, found {result.step_id}")
        flight = self._in_flight[0]
        flight.check(step, result)
        self._in_flight.popleft()
        deltas = []
        num_prompt_tokens, num_generated = 0, self._counters.generation_tokens
        drafted = dict(zip((item.request_id for item in flight.drafts), result.drafts, strict=True))
        for request, planned, sampled in zip(flight.requests, flight.scheduled, result.sampled, strict=True):
            if request.num_prompt_tokens_counted < request.num_prompt_tokens:
                num_prompt_tokens += request.count_prompt_tokens(planned.num_computed_tokens + planned.num_tokens)
            if request.finish_reason is not None:
                continue  # aborted or stopped while this step was in flight
            holds_blocks = request.is_running and request.admitted_at_step <= flight.step_id
            if sampled.error is not None and sampled.error.type == NOT_READY:
                self._compute_again(request, planned, holds_blocks)
                continue
            if sampled.error is not None:
                request.finish_reason = "error"
                deltas.append(self._ended_by_error(request, sampled.error))
                continue
            num_written = planned.num_computed_tokens + planned.num_tokens
            if planned.draft_token_ids:
                num_written -= self._count_rejected(request, planned.draft_token_ids, sampled)
                if holds_blocks:
                    request.num_computed_tokens = num_written
            if holds_blocks and num_written >= request.next_commit_at:
                self._kv_cache.commit(request, num_written, sampled.token_ids)
            if sampled.token_ids or sampled.prompt_logprobs is not None:
                deltas.append(self._apply(request, sampled, planned, drafted.get(request.request_id)))
            if self._quarantine and self._quarantine.has_passed(request):
                self._release_suspect(request)
        self._counters.tokens_per_step.observe(num_prompt_tokens + self._counters.generation_tokens - num_generated)
        return deltas

    def _compute_again(self, request: Request, planned: ScheduledRequest, holds_blocks: bool) -> None:
        """The worker could not sample yet: it computes the last known token once more, in the next step."""
        request.num_tokens -= 1
        if request.wants_prompt_logprobs:
            # they follow from hidden states of this step, which nobody has any more
            request.prompt_logprobs_start = planned.prompt_logprobs_start
            if holds_blocks:
                self._wait_again(request)
        elif holds_blocks:
            request.num_computed_tokens = request.num_tokens - 1

    def _wait_again(self, request: Request) -> None:
        """From running back to waiting, at its place in the order."""
        self._leave(request)
        insort(self._waiting, request, key=ORDER_KEY)

    def _leave(self, request: Request) -> None:
        """Take a request out of its queue, and give its blocks back."""
        queue = self._running if request.is_running else self._waiting
        key: OrderKey = request.order_key
        del queue[bisect_left(queue, key, key=ORDER_KEY)]
        request.is_running = False
        self._kv_cache.release(request)

    def _count_rejected(self, request: Request, drafts: list[int], sampled: SampledTokens) -> int:
        """Count what became of verified guesses; how many of them were wrong, and their keys and values with them."""
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
        """Take over one request's tokens up to the first that ends it. `drafted`: what comes next, if that was asked
        for."""
        token_ids = sampled.token_ids
        logprobs = sampled.logprobs
        ended = False
        for count, token_id in enumerate(token_ids, 1):
            if request.append(token_id):
                ended = True
                if count < len(token_ids):
                    token_ids = token_ids[:count]
                    logprobs = first_rows(logprobs, count)
                break
        if token_ids:
            request.num_tokens += len(token_ids) - 1  # one was counted when the step was planned
            self._counters.generation_tokens += len(token_ids)
        if sampled.prompt_logprobs is not None:
            request.num_prompt_logprobs_delivered += num_rows(sampled.prompt_logprobs)
        if request.speculation is not None and token_ids and not ended:
            request.speculation.sampled(request.token_ids, planned.draft_token_ids, len(token_ids) - 1, drafted)
            if request.speculation.awaits_worker:
                self._awaiting_drafts.append(request)
        num_cached_tokens = request.cached_tokens_to_report
        request.cached_tokens_to_report = 0
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

    def _ended_by_error(self, request: Request, error: ErrorInfo) -> RequestOutputDelta:
        self._retire(request)
        return RequestOutputDelta(
            request_id=request.request_id,
            finish_reason="error",
            num_cached_tokens=request.cached_tokens_to_report,
            error=error,
        )

    def _retire(self, request: Request) -> None:
        """Take a request that has a finish reason out of everything."""
        assert request.finish_reason is not None
        if request.speculation is not None:
            request.speculation.ended(request.token_ids, request.num_prompt_tokens)
        self._leave(request)
        self._quarantine.release(request)
        del self._requests[request.request_id]
        if request.is_known_to_worker:
            self._finished_ids.append(request.request_id)
        self._counters.finished[request.finish_reason] += 1
        self._counters.preemptions_per_request.observe(request.num_preemptions)

    # The rest

    def restart(self, cause: str) -> list[RequestOutputDelta]:
        """The worker died by `cause`; the next one knows nothing: every unfinished request waits again.

        Steps in flight are lost; their results must not be given to `update` any more. Requests that were at work in
        too many crashes end here, with an error.
        """
        guilty = self._quarantine.note_crash(self._in_flight)
        for request in self._running:
            request.is_running = False
            self._kv_cache.release(request)
        for request in self._requests.values():
            request.lose_worker()
        self._running.clear()
        self._waiting = sorted(self._requests.values(), key=ORDER_KEY)
        self._in_flight.clear()
        self._finished_ids.clear()
        self._kv_cache.forget_cached()
        self._counters.num_worker_restarts += 1
        return [self._given_up(request, num_crashes, cause) for request, num_crashes in guilty]

    def _given_up(self, request: Request, num_crashes: int, cause: str) -> RequestOutputDelta:
        request.finish_reason = "error"
        error = RequestCrashed(
            f"Request {request.request_id!r} was being computed in {num_crashes} crashes of its worker, the last: "
            f"{cause}. It is not tried again (max_request_crashes).",
            request_id=request.request_id,
            num_crashes=num_crashes,
        )
        return self._ended_by_error(request, describe(error))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing done, while a request holds blocks."""
        if self._running:
            return False
        self._kv_cache.forget_cached()
        return True

    def progress(self) -> dict[str, tuple[int, int]]:
        """Tokens known and computed of each request that has a place in the steps; if none has, of the next one."""
        requests = self._running or self._waiting[:1]
        return {request.request_id: (len(request.token_ids), request.num_computed_tokens) for request in requests}

    def stats(self) -> SchedulerStats:
        """A snapshot, but for the observations, which go on."""
        suspect = self._quarantine.current
        # beside a suspect nobody else may run
        num_deferred = sum(suspect not in (None, request) or request.awaits_result for request in self._waiting)
        return msgspec.structs.replace(
            self._counters,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_deferred=num_deferred,
            kv_cache_usage=self._kv_cache.usage,
            num_accepted_tokens_per_pos=self._counters.num_accepted_tokens_per_pos.copy(),
            finished=self._counters.finished.copy(),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError unless queues, block tables, pool and prefix cache agree."""
        for queue in (self._running, self._waiting):
            keys = [request.order_key for request in queue]
            assert keys == sorted(set(keys))
        assert len(self._running) + len(self._waiting) == len(self._requests)
        assert all(request.is_running and request.block_ids for request in self._running)
        assert not any(request.is_running or request.block_ids for request in self._waiting)
        assert all(request.finish_reason is None for request in self._requests.values())
        self._kv_cache.check_invariants(self._running)
