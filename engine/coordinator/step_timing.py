"""When to plan the next step while another one runs."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from sempre.ipc.messages import ExecuteStep

# similar steps differ by less than this fraction of their time
_SHARE = 0.25
_NUM_REMEMBERED = 8
# average contexts that differ by no more tokens than this hardly affect the time of a step
_CONTEXT_TOLERANCE = 256


class _Load(NamedTuple):
    """The amount of work in a step."""

    num_requests: int
    num_tokens: int
    context: int
    """average number of tokens in the cache"""

    def is_like(self, other: _Load) -> bool:
        """Whether a token of this step probably takes at least as long as one of the other."""
        return (
            (self.num_tokens == self.num_requests) == (other.num_tokens == other.num_requests)
            and other.num_tokens <= 2 * self.num_tokens <= 4 * other.num_tokens
            and self.context + _CONTEXT_TOLERANCE >= other.context
        )


class StepTiming:
    """Decides when to plan the step after the running one: late enough to include requests that arrive meanwhile, and
    early enough that the worker does not wait for it.

    A step is expected to take as long per token as the fastest of the last few similar ones; after a step without
    similar ones, the next one is planned at once. This never affects outputs.
    """

    def __init__(self, lead_s: float) -> None:
        """`lead_s`: generous seconds from planning a step to its arrival at the worker; 0: plan at once."""
        self._lead_s = lead_s
        self._running: deque[tuple[_Load, float]] = deque()
        self._remembered: deque[tuple[_Load, float]] = deque(maxlen=_NUM_REMEMBERED)
        self._answered_at = -math.inf

    def sent(self, step: ExecuteStep, now: float) -> None:
        """This step has been sent to the workers."""
        if not self._lead_s:
            return
        num_requests = len(step.scheduled)
        num_tokens = sum(item.num_tokens for item in step.scheduled)
        context = sum(item.num_computed_tokens for item in step.scheduled) // max(1, num_requests)
        self._running.append((_Load(num_requests, num_tokens, context), now))

    def answered(self, now: float) -> None:
        """All ranks have answered the oldest step."""
        if not self._lead_s:
            return
        load, sent_at = self._running.popleft()
        if load.num_tokens:
            self._remembered.append((load, (now - max(sent_at, self._answered_at)) / load.num_tokens))
        self._answered_at = now

    def next_at(self) -> float:
        """The earliest time to plan the next step (time.monotonic)."""
        if len(self._running) != 1:
            return -math.inf
        load, sent_at = self._running[0]
        alike = [seconds for other, seconds in self._remembered if load.is_like(other)]
        if not alike:
            return -math.inf
        seconds = min(alike) * load.num_tokens
        return max(sent_at, self._answered_at) + seconds - max(self._lead_s, _SHARE * seconds)

    def reset(self) -> None:
        """The workers and their steps are gone."""
        self._running.clear()
        self._remembered.clear()
