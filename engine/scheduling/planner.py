"""Which request computes what in the next step, and who is preempted for KV cache blocks.

Order is (priority, ordinal, request id), lower first; the priority only counts under the policy "priority".
One step has at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests, and at most
`max_prompt_tokens` of them belong to prompts, since these delay decoding requests; where a prompt token costs more than
usual, far from the beginning or scored, fewer:

1. running requests, in order; one that needs a block when none is left preempts the last running request, or itself;
2. then, if none was preempted, waiting requests, in order, while the first of them fits.

None overtakes another, with one exception: where prompts would fill the step, up to a quarter of their tokens is kept
for shorter prompts after them. So a short request waits for a step, and not for all of the long prompts before it.

A step has at most `max_adapters` adapters, so a request may wait until no running request uses one of them. Later
requests, of no adapter or of those in use, overtake the first that waits so, `max_num_seqs` of them; then all wait.

A preempted request frees its blocks and slots of states, waits again at its place in the order, and is recomputed. This
never affects a request's tokens: they depend on its own prompt, parameters and seed alone.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from itertools import chain

from sempre.engine.scheduling.kv_cache_manager import KVCacheManager
from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.planned_step import PlannedStep
from sempre.engine.scheduling.request import Request
from sempre.engine.scheduling.state_slots import StateAccess
from sempre.engine.scheduling.stats import SchedulerStats
from sempre.engine.scheduling.waiting_queue import ORDER_KEY, WaitingQueue, remove

# fraction of a step's prompt tokens kept for prompts shorter than the one that would take the last of them
_SHARE_FOR_SHORT = 4


class StepPlanner:
    """The running and waiting requests, and the blocks of the running ones; paused requests are in neither queue."""

    def __init__(self, limits: Limits, kv_cache: KVCacheManager, counters: SchedulerStats) -> None:
        self._limits = limits
        self.kv_cache = kv_cache
        self._counters = counters
        self.running: list[Request] = []  # sorted by order key
        self.waiting = WaitingQueue()
        self.num_paused = 0
        self._running_adapters: Counter[str] = Counter()  # running requests by their adapter

    def plan(self, step_id: int, alone: Request | None, now: float) -> PlannedStep:
        """Plan the next step, of one request if one must run `alone`; it is empty if there is nothing to compute.

        A request waits for its draft worker as long as its `Ask` is open at the time `now`.
        """
        step = PlannedStep(step_id, self._limits)
        if alone is None:
            short = self._short_waiting(step) if self.waiting else []
            kept = sum(request.prompt_cost(0, request.num_tokens) for request in short)
            step.keep(kept)
            is_roomy = self._plan_running(step, now)
            if is_roomy:
                self._plan_waiting(step)
            step.give_back(kept)
            if is_roomy and short:
                self._plan_short(step, short)
        elif alone.is_running:
            self._plan_running(step, now)  # no other request is running
        else:
            self._admit(step, alone)
        if self.kv_cache.states is not None:
            self.kv_cache.states.end_step()
        return step

    def waits_for_drafts(self, now: float) -> bool:
        """Whether a running request must wait for a result or its draft worker before its next step is planned."""
        return any(request.speculation is not None and _must_wait(request, now) for request in self.running)

    def wait(self, request: Request) -> None:
        """Queue a request that is not running, at its place in the order."""
        self.waiting.add(request)

    def pause(self, request: Request) -> None:
        """Remove a request from its queue until `resume`, and free its blocks."""
        self.leave(request)
        request.is_paused = True
        self.num_paused += 1

    def resume(self, request: Request) -> None:
        """Let a paused request wait at its place in the order."""
        self.leave(request)
        self.wait(request)

    def leave(self, request: Request) -> None:
        """Remove a request from its queue, if it is in one, and free its blocks."""
        if request.is_paused:
            request.is_paused = False
            self.num_paused -= 1
            return
        if request.is_running:
            remove(self.running, request)
        else:
            self.waiting.remove(request)
        if request.is_running and request.adapter is not None:
            self._running_adapters[request.adapter] -= 1
            if not self._running_adapters[request.adapter]:
                del self._running_adapters[request.adapter]
        request.is_running = False
        self.kv_cache.release(request)

    def wait_again(self, request: Request) -> None:
        """Move a request from running back to waiting, at its place in the order."""
        self.leave(request)
        self.wait(request)

    def restart(self, requests: Iterable[Request]) -> None:
        """Make all `requests` wait that are not paused: the worker has died, and the cache is empty."""
        for request in self.running:
            request.is_running = False
            self.kv_cache.release(request)
        self.running.clear()
        self._running_adapters.clear()
        self.waiting = WaitingQueue(request for request in requests if not request.is_paused)
        self.kv_cache.forget_cached()

    def _plan_running(self, step: PlannedStep, now: float) -> bool:
        """Plan running requests; False if one was preempted, so that no waiting request takes the blocks it needs."""
        running = self.running
        num_running = len(running)
        is_stateless = self.kv_cache.states is None
        # preemption pops from the tail: a later request, or the current one
        for index, request in enumerate(running):
            if not step.budget:
                break
            start = request.num_computed_tokens
            if is_stateless and request.is_plain and start + 1 == request.num_tokens <= request.compute_limit:
                grown = [] if start < request.num_slots else self._grow_or_preempt(request, start + 1)
                if grown is None:
                    break
                step.add_token(request, grown)
                continue
            num_new = min(request.num_tokens, request.compute_limit) - start
            if num_new < 1 or request.is_held_back:
                continue  # its last token is in flight
            if request.speculation is not None and _must_wait(request, now):
                continue
            num_later = num_running - index - 1
            if num_new > 1:
                # a long prompt leaves one token for each later request, so that these keep decoding
                room = request.prompt_room(start, step.prompt_budget)
                num_new = min(num_new, room, max(1, step.budget - num_later))
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
                room = min(step.budget - num_new - num_later, self._limits.max_draft_tokens - step.num_draft_tokens)
                drafts, more_blocks = self._drafts(request, room)
                block_ids = block_ids + more_blocks
            states = self._plan_states(request, num_new, len(drafts))
            step.add(request, num_new, block_table_start, block_ids, drafts, states)
        return len(running) == num_running

    def _drafts(self, request: Request, room: int) -> tuple[list[int], list[int]]:
        """Draft tokens to verify after the request's last token, and blocks for them; these never cause preemption."""
        assert request.speculation is not None
        room = min(room, request.compute_limit - request.num_tokens)
        if self.kv_cache.states is not None:
            room = min(room, self.kv_cache.states.num_spare)
        drafts = request.speculation.drafts(request.token_ids, max(0, room))
        block_ids: list[int] | None = []
        if request.num_tokens + len(drafts) > request.num_slots:
            block_ids = self.kv_cache.grow(request, request.num_tokens + len(drafts))
        if block_ids is None:
            drafts, block_ids = drafts[: request.num_slots - request.num_tokens], []
        return drafts, block_ids

    def _grow_or_preempt(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for the first `num_tokens` tokens, preempting the last requests; None if it preempted this one."""
        while (block_ids := self.kv_cache.grow(request, num_tokens)) is None:
            victim = self.running[-1]
            self.wait_again(victim)
            self._counters.num_preemptions += 1
            victim.num_preemptions += 1
            if victim is request:
                return None
        return block_ids

    def _plan_waiting(self, step: PlannedStep) -> None:
        """Admit waiting requests in order; they overtake those that wait for a slot of their adapter."""
        most = self._limits.max_num_seqs
        while self.waiting and len(self.running) < most and step.has_room_for_prompts:
            first: Request = self.waiting.first
            request: Request | None = first
            if not self.has_adapter_slot(first):
                request = None
                if first.num_overtaken < most:
                    request = self.waiting.first_of_adapters(self._running_adapters)
            if request is None or not self._admit(step, request):
                break
            if request is not first:
                first.num_overtaken += 1

    def has_adapter_slot(self, request: Request) -> bool:
        """Whether the running requests leave a slot for this one's adapter, or use it themselves."""
        in_use = self._running_adapters
        return request.adapter is None or request.adapter in in_use or len(in_use) < self._limits.max_adapters

    def _short_waiting(self, step: PlannedStep) -> list[Request]:
        """Waiting requests with a shorter prompt than the one that would take the last room for prompts, up to a share
        of it. None of them has a lower priority than that one."""
        share = min(step.prompt_budget // _SHARE_FOR_SHORT, step.budget - len(self.running))
        if len(self.running) >= self._limits.max_num_seqs or share < 1:
            return []
        room = step.prompt_budget
        for request in chain(self.running, self.waiting):
            num_new = min(request.num_tokens, request.compute_limit) - request.num_computed_tokens
            needed = request.prompt_cost(request.num_computed_tokens, num_new)
            if num_new > 1 or not request.is_running:
                room -= needed
            if room < 0:
                after = None if request.is_running else request.order_key
                return self.waiting.shorter(after, needed - 1, share, request.order_key[0])
        return []

    def _plan_short(self, step: PlannedStep, short: list[Request]) -> None:
        """Admit those of `short` that still wait, for which room was kept, and others in order if there is more."""
        for request in short:
            if request.is_running or not self.has_adapter_slot(request):
                continue
            if len(self.running) >= self._limits.max_num_seqs or not self._admit(step, request):
                return
        self._plan_waiting(step)

    def _admit(self, step: PlannedStep, request: Request) -> bool:
        """Plan the first tokens of a waiting request; False if it does not fit now."""
        if request.awaits_result:
            return False  # preempted while its last token or drafts were in flight
        assert self.has_adapter_slot(request)
        cached_blocks = self.kv_cache.find_cached_blocks(request)
        if not self.kv_cache.can_admit(request, cached_blocks):
            return False
        num_cached = len(cached_blocks) * self.kv_cache.block_size
        num_new = min(request.num_tokens - num_cached, step.budget, request.prompt_room(num_cached, step.prompt_budget))
        self.kv_cache.admit(request, cached_blocks, num_cached + num_new)
        self._count_admission(request, num_cached)
        self.waiting.remove(request)
        insort(self.running, request, key=ORDER_KEY)
        request.is_running = True
        request.num_overtaken = 0
        if request.adapter is not None:
            self._running_adapters[request.adapter] += 1
        request.admitted_at_step = step.step_id
        if not request.is_known_to_worker:
            request.is_known_to_worker = True
            step.new_requests.append(request.as_new())
        step.add(request, num_new, 0, request.block_ids.copy(), [], self._plan_states(request, num_new))
        return True

    def _plan_states(self, request: Request, num_tokens: int, num_drafts: int = 0) -> StateAccess:
        """Slots for the next tokens of a running request; none for a model without states."""
        if self.kv_cache.states is None:
            return StateAccess()
        samples = request.num_computed_tokens + num_tokens == request.num_tokens
        keeps_last = samples and request.waits_for_tokens
        return self.kv_cache.states.plan(request, num_tokens, num_drafts, keeps_last=keeps_last)

    def _count_admission(self, request: Request, num_cached: int) -> None:
        counters = self._counters
        if self.kv_cache.enable_prefix_caching and request.reads_prefix_cache:
            counters.prefix_cache_queries += len(request.token_ids)
            counters.prefix_cache_hits += num_cached
        if not request.was_admitted:
            request.was_admitted = True
            request.cached_tokens_to_report = num_cached
            counters.prompt_tokens += request.num_prompt_tokens
            counters.cached_prompt_tokens += num_cached

    def check_invariants(self) -> None:
        """Raise AssertionError unless queues, block tables, pool and prefix cache agree."""
        self.waiting.check_invariants()
        for queue in (self.running, self.waiting):
            keys = [request.order_key for request in queue]
            assert keys == sorted(set(keys))
        assert all(request.is_running and request.block_ids for request in self.running)
        assert not any(request.is_running or request.block_ids for request in self.waiting)
        used = Counter(request.adapter for request in self.running if request.adapter is not None)
        assert used == self._running_adapters
        assert len(used) <= self._limits.max_adapters
        self.kv_cache.check_invariants(self.running)


def _must_wait(request: Request, now: float) -> bool:
    """Whether the request's next step depends on a pending result or draft."""
    speculation = request.speculation
    assert speculation is not None
    if request.drafts_in_flight or (speculation.ask is not None and speculation.ask.is_open(now)):
        return True
    return speculation.must_wait(request.token_ids, request.num_tokens - len(request.token_ids))
