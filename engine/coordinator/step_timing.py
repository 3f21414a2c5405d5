"""When the next step is planned while another one runs."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from sempre.ipc.messages import ExecuteStep

# steps that are alike differ by less than this share of their time
_SHARE = 0.25
_NUM_REMEMBERED = 8
# contexts that differ by no more tokens than this, on average, hardly show in the time of a step
_CONTEXT_TOLERANCE = 256


class _Load(NamedTuple):
    """The work of a step."""

    num_requests: int
    num_tokens: int
    context: int
    """tokens in the cache, on average"""

    def is_like(self, other: _Load) -> bool:
        """Whether a token of this step takes at least as long as one of the other, as far as can be told."""
        return (
            (self.num_tokens == self.num_requests) == (other.num_tokens == other.num_requests)
            and other.num_tokens <= 2 * self.num_tokens <= 4 * other.num_tokens
            and self.context + _CONTEXT_TOLERANCE >= other.context
        )


class StepTiming:
    """Says when to plan the step after the one that runs: so late that requests which arrive meanwhile are still part
    of it, and early enough that the worker need not wait for it.

    A step is expected to take as long per token as the fastest of the last few that were like it; after one that is
    like none of them, the next one is planned at once. It cannot be seen in outputs.
    """

    def __init__(self, lead_s: float) -> None:
        """Seconds from planning a step to its arrival at the worker, amply; 0: plan at once."""
        self._lead_s = lead_s
        self._running: deque[tuple[_Load, float]] = deque()
        self._remembered: deque[tuple[_Load, float]] = deque(maxlen=_NUM_REMEMBERED)
        self._answered_at = -math.inf

    def sent(self, step: ExecuteStep, now: float) -> None:
        """The workers have been sent this step."""
        num_requests = len(step.scheduled)
        num_tokens = sum(item.num_tokens for item in step.scheduled)
        context = sum(item.num_computed_tokens for item in step.scheduled) // max(1, num_requests)
        self._running.append((_Load(num_requests, num_tokens, context), now))

    def answered(self, now: float) -> None:
        """The oldest step has been answered by all ranks."""
        load, sent_at = self._running.popleft()
        if load.num_tokens:
            self._remembered.append((load, (now - max(sent_at, self._answered_at)) / load.num_tokens))
        self._answered_at = now

    def next_at(self) -> float:
        """The time from which on the next step may be planned (time.monotonic)."""
        if not self._lead_s or len(self._running) != 1:
            return -math.inf
        load, sent_at = self._running[0]
        alike = [seconds for other, seconds in self._remembered if load.is_like(other)]
        if not alike:
            return -math.inf
        seconds = min(alike) * load.num_tokens
        return max(sent_at, self._answered_at) + seconds - max(self._lead_s, _SHARE * seconds)

    def reset(self) -> None:
        """The workers are gone, and with them what they were sent."""
        self._running.clear()
        self._remembered.clear()
