"""Monitors whether the coordinator answers, and whether the workers of a dead one are gone."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping

from sempre.ipc.liveness import LONGEST_PAUSE_S


class HeartbeatMonitor:
    """Sends a heartbeat every `interval_s`, and measures the silence since the first unanswered one.

    Time in which this process was not polling does not count.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._asked_at: float | None = None
        self._next_beat = 0.0
        self._looked_at = time.monotonic()

    def heard(self) -> None:
        """Record a frame; any frame is a sign of life."""
        self._asked_at = None

    def is_due(self) -> bool:
        """Whether to send a heartbeat now; if True, it counts as sent."""
        now = time.monotonic()
        if now < self._next_beat:
            return False
        self._next_beat = now + self._interval_s
        if self._asked_at is None:
            self._asked_at = now
        return True

    def silence_s(self, limit_s: float) -> float | None:
        """Seconds of silence once they exceed `limit_s`, else None. Call this when nothing is left to read."""
        now = time.monotonic()
        pause_s, self._looked_at = now - self._looked_at, now
        if self._asked_at is None:
            return None
        if pause_s > LONGEST_PAUSE_S:
            self._asked_at += pause_s
        silence = now - self._asked_at
        return silence if silence > limit_s else None


class WorkerWatch:
    """Holds a descriptor of each worker process, opened while its coordinator ran, since process ids may be reused.

    If the system has no such descriptors, all count as gone.
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}

    def follow(self, pids: Mapping[int, int]) -> None:
        """Watch these processes, by rank, instead of the previous ones of these ranks."""
        for rank, pid in pids.items():
            self._drop(rank)
            if hasattr(os, "pidfd_open"):
                try:
                    self._descriptors[rank] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue

    def running(self) -> list[int]:
        """The ranks whose process has not ended."""
        poller = select.poll()
        for descriptor in self._descriptors.values():
            poller.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poller.poll(0)}
        return [rank for rank, descriptor in self._descriptors.items() if descriptor not in ended]

    def close(self) -> None:
        for rank in list(self._descriptors):
            self._drop(rank)

    def _drop(self, rank: int) -> None:
        descriptor = self._descriptors.pop(rank, None)
        if descriptor is not None:
            os.close(descriptor)
