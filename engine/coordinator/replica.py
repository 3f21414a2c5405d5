"""One replica of the model: its scheduler and the ranks that execute its steps together."""

from __future__ import annotations

import time
from collections import deque

from sempre.engine.executor.base import Executor
from sempre.engine.scheduling import Scheduler, SchedulerStats
from sempre.ipc.messages import ExecuteStep, RequestOutputDelta, RequestSpec, StepResult


class Replica:
    """Keeps its workers busy with the scheduler's steps, at most `max_steps_in_flight` at a time.

    With two, a step is planned and sent while the one before it runs. A request that turns out to have ended is then
    computed once in vain; nothing else is seen of it.
    """

    def __init__(self, ranks: range, scheduler: Scheduler, executor: Executor, *, max_steps_in_flight: int = 1) -> None:
        self.ranks = ranks
        self._max_steps_in_flight = max_steps_in_flight
        self._scheduler = scheduler
        self._executor = executor
        self._in_flight: deque[ExecuteStep] = deque()
        self._sent_at: deque[float] = deque()
        self._results: dict[int, StepResult] = {}
        self._tokens: dict[str, int] = {}
        self.load = 0

    def add(self, spec: RequestSpec) -> None:
        """Raises RequestError when the request can never run."""
        self._scheduler.add(spec)
        tokens = len(spec.prompt_token_ids) + spec.params.max_tokens
        self._tokens[spec.request_id] = tokens
        self.load += tokens

    def abort(self, request_id: str, finish_reason: str) -> RequestOutputDelta | None:
        delta = self._scheduler.abort(request_id, finish_reason)
        if delta is not None:
            self._forget(request_id)
        return delta

    def advance(self) -> None:
        """Send the next step when the workers have room for one."""
        while len(self._in_flight) < self._max_steps_in_flight and self._scheduler.has_unfinished():
            step = self._scheduler.schedule()
            if step is None:
                return
            self._in_flight.append(step)
            self._sent_at.append(time.monotonic())
            for rank in self.ranks:
                self._executor.send(rank, step)

    def take(self, rank: int, result: StepResult) -> list[RequestOutputDelta]:
        """What a step has brought, once the last of its ranks has answered. Raises ProtocolError."""
        self._results[rank] = result
        if len(self._results) < len(self.ranks):
            return []
        result = self._results[self.ranks[0]]
        self._results.clear()
        outputs = self._scheduler.update(self._in_flight[0], result)
        self._in_flight.popleft()
        self._sent_at.popleft()
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return outputs

    def restart(self) -> None:
        """The workers were replaced by fresh ones: every unfinished request is computed again."""
        self._scheduler.restart()
        self._in_flight.clear()
        self._sent_at.clear()
        self._results.clear()

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_unfinished

    @property
    def step_age_s(self) -> float:
        """Seconds since the oldest step in flight was sent; 0 while there is none."""
        return time.monotonic() - self._sent_at[0] if self._sent_at else 0.0

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def _forget(self, request_id: str) -> None:
        self.load -= self._tokens.pop(request_id)
