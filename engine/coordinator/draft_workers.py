"""The draft workers of an engine, one for each replica: start, death and restart.

Their failures cost speed, never a request, which continues without drafts.
"""

from __future__ import annotations

import logging
from collections import Counter

from sempre.engine.coordinator.draft_link import PATIENCE_S, DraftLink
from sempre.engine.coordinator.startup import StartUp
from sempre.engine.executor.base import Executor, draft_ranks
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import SempreError, WorkerDied
from sempre.ipc.messages import StepResult, WorkerEvent

logger = logging.getLogger(__name__)


class DraftWorkers:
    """Keeps the draft workers of `executor` running; `links[i]` serves replica i."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.ranks = draft_ranks(config)
        self.links = [DraftLink() for _ in self.ranks]
        self._executor = executor
        self._startup = StartUp(config, executor, self.ranks)
        self._max_restarts = config.max_restarts
        self._num_restarts: Counter[int] = Counter()  # since it last served
        self._has_served = False
        self._told_late = False
        self._sleeps = False

    @property
    def are_ready(self) -> bool:
        return self._startup.ready is not None

    @property
    def step_seconds(self) -> float:
        """Expected time of one draft token; known while they serve."""
        return self._startup.costs.step

    def serve(self, target: StartUp) -> list[int]:
        """The engine is ready: from now on a failure only costs speed. Returns their process ids.

        Raises SeedMismatch, or ConfigError if their tokens are not the target's.
        """
        assert self._startup.ready is not None
        target.check_drafts(self._startup)
        self._has_served = True
        for link in self.links:
            link.begin(self._startup.ready.vocab_size)
        return self._startup.ready.worker_pids

    def advance(self, now: float) -> list[str]:
        """Send the next steps; return notices for the user."""
        notices: list[str] = []
        for rank, link in zip(self.ranks, self.links, strict=True):
            step = link.next_step(now)
            if step is None:
                continue
            try:
                self._executor.send(rank, step)
            except WorkerDied as error:
                notices += self.lose(rank, error)
        if not self._told_late and any(link.is_late(now) for link in self.links):
            self._told_late = True
            notices.append(
                f"a draft worker has not answered within {PATIENCE_S:g} s: requests continue without its drafts "
                "whenever it is late. The outputs are the same."
            )
        return notices

    def next_deadline(self, now: float) -> float | None:
        """When the first waiting request continues without drafts."""
        deadlines = [deadline for link in self.links if (deadline := link.next_deadline(now)) is not None]
        return min(deadlines, default=None)

    def handle(self, rank: int, event: WorkerEvent) -> list[str]:
        """Handle an event of a draft worker; return notices for the user. Raises only before the engine serves."""
        if not self._has_served:
            self._startup.handle(rank, event)
            return []
        link = self.links[self.ranks.index(rank)]
        try:
            if isinstance(event, StepResult):
                link.take(event)
            elif self._startup.rejoin(rank, event):
                assert self._startup.ready is not None
                link.begin(self._startup.ready.vocab_size)
                self._num_restarts[rank] = 0
        except SempreError as error:
            return self.lose(rank, error)
        return []

    def sleep(self) -> None:
        """End the workers until `wake_up`."""
        self._sleeps = True
        for rank, link in zip(self.ranks, self.links, strict=True):
            link.end()
            self._startup.forget([rank])
            self._executor.abandon(rank)

    def wake_up(self) -> list[str]:
        """Start successors, if the workers sleep; requests continue without drafts until they are ready. Returns
        notices for the user."""
        sleeps, self._sleeps = self._sleeps, False
        notices: list[str] = []
        for rank in self.ranks if sleeps else ():
            try:
                self._executor.restart(rank, "the engine wakes up")
            except (OSError, SempreError) as error:
                notices += self.lose(rank, error)
        return notices

    def lose(self, rank: int, error: SempreError | OSError) -> list[str]:
        """A draft worker has died or is wrong: start a successor, at most `max_restarts` times before it serves.

        Returns notices for the user.
        """
        logger.warning("%s", error)
        self.links[self.ranks.index(rank)].end()
        self._startup.forget([rank])
        is_first = self._num_restarts[rank] == 0
        while self._num_restarts[rank] < self._max_restarts:
            self._num_restarts[rank] += 1
            try:
                self._executor.restart(rank, str(error))
            except (OSError, SempreError) as another:
                error = another
            else:
                return [f"{_failed(error)} while it is restarted. The outputs are the same."] if is_first else []
        self._executor.abandon(rank)
        starts = f"{self._max_restarts} starts (max_restarts)"
        return [f"{_failed(error)}; it has not come back after {starts} and is given up."]


def _failed(error: SempreError | OSError) -> str:
    return f"a draft worker has failed: {str(error).splitlines()[0]}. Requests continue without its drafts"
