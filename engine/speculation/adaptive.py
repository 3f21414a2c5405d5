"""How many tokens to guess, from how the last guesses of the same request went and what a guess costs."""

from __future__ import annotations

from typing import NamedTuple

_START = 0.7
_WEIGHT = 1 / 8


class GuessCosts(NamedTuple):
    """In steps of the target."""

    first: float
    """what a step with guesses costs more, however many: the next one is not planned before its result is known"""
    each: float
    """a guess and its row in the step"""


class DraftLength:
    """At most `longest`; 0 while steps without guesses bring more tokens in the same time.

    With share r of right guesses, weighted towards the last of them, a step with k guesses brings 1 + r + … + r^k
    tokens (Leviathan et al., arXiv:2211.17192, section 3.1, for independent guesses) and costs 1 + first + k · each.
    """

    def __init__(self, longest: int, *, costs: GuessCosts, adaptive: bool = True) -> None:
        self._longest = longest
        self._costs = costs
        self.adapts = adaptive
        self._rate = _START
        self.current = longest if not adaptive else self._length()

    def observe(self, num_right: int, *, missed: bool) -> None:
        """`num_right` guesses in a row were right; the one after them was wrong if `missed`."""
        if not self.adapts:
            return
        for _ in range(num_right):
            self._rate += (1.0 - self._rate) * _WEIGHT
        if missed:
            self._rate -= self._rate * _WEIGHT
        self.current = self._length()

    def _length(self) -> int:
        best, best_speed = 0, 1.0
        tokens, kept, cost = 1.0, 1.0, 1.0 + self._costs.first
        for length in range(1, self._longest + 1):
            kept *= self._rate
            tokens += kept
            cost += self._costs.each
            if tokens / cost > best_speed:
                best, best_speed = length, tokens / cost
        return best
