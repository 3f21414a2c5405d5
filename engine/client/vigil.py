"""Whether the other end of a link still answers, judged by one who is not always listening."""

from __future__ import annotations

import time

from sempre.ipc.liveness import LONGEST_PAUSE_S


class Vigil:
    """Asks with a heartbeat every `interval_s`, and counts the silence from the first one that went unanswered.

    Time in which this process did not look does not count.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._asked_at: float | None = None
        self._next_beat = 0.0
        self._looked_at = time.monotonic()

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

    def silence_s(self, limit_s: float) -> float | None:
        """Seconds of silence once they exceed `limit_s`, else None. To be asked when nothing is left to be read."""
        now = time.monotonic()
        pause_s, self._looked_at = now - self._looked_at, now
        if self._asked_at is None:
            return None
        if pause_s > LONGEST_PAUSE_S:
            self._asked_at += pause_s
        silence = now - self._asked_at
        return silence if silence > limit_s else None
