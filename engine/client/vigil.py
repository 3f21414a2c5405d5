"""Whether the other end of a link still answers, judged by one who is not always listening."""

from __future__ import annotations

import time


class Vigil:
    """Asks with a heartbeat every `interval_s`, and counts the silence from the first one that went unanswered."""

    def __init__(self, interval_s: float, timeout_s: float) -> None:
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._asked_at: float | None = None
        self._next_beat = 0.0

    def heard(self) -> None:
        """Any frame is a sign of life."""
        self._asked_at = None

    def is_due(self) -> bool:
        """Whether a heartbeat is to be sent now; counts as sent when True."""
        now = time.monotonic()
        if now < self._next_beat:
            return False
        self._next_beat = now + self._interval_s
        if self._asked_at is None:
            self._asked_at = now
        return True

    def silence_s(self) -> float | None:
        """Seconds of silence once they exceed the limit, else None. To be asked when nothing is left to be read."""
        if self._asked_at is None:
            return None
        silence = time.monotonic() - self._asked_at
        return silence if silence > self._timeout_s else None
