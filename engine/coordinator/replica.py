"""One replica of the model: its scheduler and the ranks that execute its steps together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from msgspec.structs import replace

from sempre.engine.coordinator.draft_link import DraftLink
from sempre.engine.coordinator.rank_comparison import compare_ranks
from sempre.engine.coordinator.step_timing import StepTiming
from sempre.engine.executor.base import Executor
from sempre.engine.scheduling import Scheduler, SchedulerStats
from sempre.engine.scheduling.prefix_cache import BlockKey
from sempre.ipc.messages import ExecuteStep, RequestOutputDelta, RequestSpec, StepResult


def best_replica(replicas: Sequence[Replica], spec: RequestSpec) -> Replica:
    """The replica with the fewest tokens to compute if it gets this request: its load, less what it has cached of the
    request. Then the one that has cached more, then the first. One without workers is the last choice.

    So requests follow a common prefix until the replica that has it is busier by more tokens than it saves.
    """
    if len(replicas) == 1:
        return replicas[0]
    keys: list[BlockKey] = []
    # log-probabilities of a prompt need all of it
    reads_cache = spec.params.first_scored_token is None
    cached = [replica.num_cached_tokens(spec, keys) if reads_cache else 0 for replica in replicas]
    candidates = zip(replicas, cached, strict=True)
    return min(candidates, key=lambda pair: (not pair[0].has_workers, pair[0].load - pair[1], -pair[1]))[0]


class Replica:
    """Keeps its workers busy with the scheduler's steps, at most `max_steps_in_flight` at a time.

    With two, a step is planned and sent while the one before it runs. A finished request may run one extra step; its
    result is discarded.
    """

    def __init__(
        self,
        ranks: range,
        scheduler: Scheduler,
        executor: Executor,
        drafts: DraftLink | None = None,
        *,
        max_steps_in_flight: int = 1,
        step_lead_s: float = 0.0,
        ranks_per_stage: int | None = None,
    ) -> None:
        """`drafts` is the link to this replica's draft worker, if any; `step_lead_s`: see `StepTiming`. By default all
        ranks are one stage."""
        self.ranks = ranks
        self._ranks_per_stage = ranks_per_stage or len(ranks)
        self._drafts = drafts
        self._max_steps_in_flight = max_steps_in_flight
        self._scheduler = scheduler
        self._executor = executor
        self._in_flight: deque[ExecuteStep] = deque()
        self._timing = StepTiming(step_lead_s)
        self._results: dict[int, dict[int, StepResult]] = {}
        """by step, then rank: of steps that not all ranks have answered"""
        self._tokens: dict[str, int] = {}
        # until the first step, then until the first output
        self._added_at: dict[str, float] = {}
        self._time_in_queue: dict[str, float] = {}
        self.load = 0
        self.has_workers = True

    def add(self, spec: RequestSpec) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        self._scheduler.add(spec)
        tokens = len(spec.prompt_token_ids) + spec.params.max_tokens
        self._tokens[spec.request_id] = tokens
        self._added_at[spec.request_id] = time.monotonic()
        self.load += tokens

    def num_cached_tokens(self, spec: RequestSpec, keys: list[BlockKey]) -> int:
        """How long a prefix of a new request this replica need not compute; `keys`: see `KVCacheManager`."""
        return self._scheduler.num_cached_tokens(spec, keys)

    def abort(self, request_id: str, finish_reason: str) -> RequestOutputDelta | None:
        delta = self._scheduler.abort(request_id, finish_reason)
        if delta is not None:
            self._forget(request_id)
        return delta

    def pause_request(self, request_id: str) -> None:
        """Compute no more of a request until `resume_request`."""
        self._scheduler.pause(request_id)

    def resume_request(self, request_id: str) -> None:
        """Continue a paused request."""
        self._scheduler.resume(request_id)

    def advance(self, now: float) -> None:
        """Send the next step if the workers have room for one and it is time."""
        if not self.has_workers:
            return
        while len(self._in_flight) < self._max_steps_in_flight and self._scheduler.has_unfinished():
            if self._in_flight and now < self._timing.next_at():
                return
            step = self._scheduler.schedule(now)
            if step is None:
                return
            self._in_flight.append(step)
            self._timing.sent(step, now)
            for new in step.new_requests:
                # known already: preempted, or the workers are new
                if new.request_id in self._added_at:
                    waited = now - self._added_at.pop(new.request_id)
                    self._time_in_queue[new.request_id] = waited
            for rank in self.ranks:
                self._executor.send(rank, step)

    def next_deadline(self, now: float) -> float | None:
        """When `advance` will have a step to send without a new message; None if unknown."""
        is_due = self.has_workers and 0 < len(self._in_flight) < self._max_steps_in_flight
        if not is_due or not self._scheduler.has_unfinished():
            return None
        deadline = self._timing.next_at()
        return deadline if deadline > now else None

    def take(self, rank: int, result: StepResult) -> list[RequestOutputDelta]:
        """Return the outputs of a step once the last of its ranks has answered. Raises ProtocolError, and RanksDiffer
        unless all have computed the same."""
        results = self._results.setdefault(result.step_id, {})
        results[rank] = result
        if len(results) < len(self.ranks):
            return []
        del self._results[result.step_id]
        result = compare_ranks(results, self._ranks_per_stage)
        outputs = self._scheduler.update(self._in_flight[0], result)
        step, now = self._in_flight.popleft(), time.monotonic()
        self._timing.answered(now)
        self._scheduler.record_time(step, result, now)
        if self._time_in_queue:
            outputs = [self._timed(output) for output in outputs]
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        if self._drafts is not None:
            self._drafts.ask(self._scheduler.take_asking())
        return outputs

    def _timed(self, output: RequestOutputDelta) -> RequestOutputDelta:
        waited = self._time_in_queue.pop(output.request_id, None)
        return output if waited is None else replace(output, time_in_queue=waited)

    def lose_workers(self, cause: str) -> list[RequestOutputDelta]:
        """A worker died from `cause`: requests wait for `resume` and are recomputed. Returns the ends of those that
        fail because they were in flight in too many crashes."""
        self.has_workers = False
        self._in_flight.clear()
        self._timing.reset()
        self._results.clear()
        failed = self._scheduler.restart(cause)
        for delta in failed:
            self._forget(delta.request_id)
        return failed

    def resume(self) -> None:
        """New workers are ready."""
        self.has_workers = True

    def forget_computed(self) -> None:
        """No step is in flight: requests keep their tokens, and the workers forget everything else."""
        assert not self._in_flight
        self._timing.reset()
        self._scheduler.forget_computed()

    @property
    def is_computing(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._in_flight)

    @property
    def has_work(self) -> bool:
        """Whether a step is in flight, or a request is unfinished and not paused."""
        return bool(self._in_flight) or self._scheduler.has_unfinished()

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_unfinished

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def stats(self) -> SchedulerStats:
        stats = self._scheduler.stats()
        # without workers, room does not help
        return stats if self.has_workers else replace(stats, num_deferred=stats.num_waiting)

    def _forget(self, request_id: str) -> None:
        self.load -= self._tokens.pop(request_id)
        self._added_at.pop(request_id, None)
        self._time_in_queue.pop(request_id, None)
        if self._drafts is not None:
            self._drafts.forget(request_id)
