"""How often a process may be restarted before the engine gives up."""

from __future__ import annotations

import time
from collections import deque


class RestartBudget:
    """At most `max_restarts` in any `window_s` seconds."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Whether one more restart is allowed now; if so, count it."""
        now = time.monotonic()
        while self._times and now - self._times[0] > self._window_s:
            self._times.popleft()
        if len(self._times) >= self._max_restarts:
            return False
        self._times.append(now)
        return True

    def forgive(self, count: int) -> None:
        """Uncount the last `count` restarts: their cause is known and gone."""
        for _ in range(min(count, len(self._times))):
            self._times.pop()

    def exhausted(self) -> str:
        """Why no restart is allowed, in words."""
        if not self._max_restarts:
            return "it is not restarted (max_restarts=0)"
        return (
            f"it was restarted {len(self._times)} times within {self._window_s:g} s "
            f"(max_restarts={self._max_restarts}) and is given up"
        )
