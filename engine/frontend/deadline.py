"""A point in time by which something must have happened."""

from __future__ import annotations

import time


class Deadline:
    """`timeout_s` seconds from now; None is never."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self, what: str) -> float | None:
        """Return the seconds left, None without a deadline. Raises TimeoutError that says `what` when it has passed."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0.0:
            raise TimeoutError(f"{what} within {self._timeout_s} s")
        return left
