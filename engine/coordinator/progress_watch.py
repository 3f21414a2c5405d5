"""Which requests of a replica make no progress."""

from __future__ import annotations

from sempre.engine.scheduling import Scheduler
from sempre.ipc.messages import StalledRequests


class ProgressWatch:
    """Watches the running requests of one replica; if none runs, the first waiting one.

    A request that queues while others progress is not stalled. The age counts from the first check without progress.
    """

    def __init__(self, rank: int, scheduler: Scheduler) -> None:
        self._rank = rank
        self._scheduler = scheduler
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def look(self, now: float) -> None:
        seen = self._seen
        self._seen = {
            name: (progress, seen[name][1] if name in seen and seen[name][0] == progress else now)
            for name, progress in self._scheduler.progress().items()
        }

    def forget(self) -> None:
        """Count the age of every request anew."""
        self._seen.clear()

    def stalled(self, now: float, limit_s: float) -> StalledRequests | None:
        """Requests without progress for longer than `limit_s`; None if there are none."""
        self.look(now)
        ages = {name: age_s for name, (_, since) in self._seen.items() if (age_s := now - since) > limit_s}
        if not ages:
            return None
        oldest = max(ages, key=lambda name: ages[name])
        return StalledRequests(rank=self._rank, num_requests=len(ages), request_id=oldest, age_s=ages[oldest])
