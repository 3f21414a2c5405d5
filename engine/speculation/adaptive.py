"""How many tokens to guess, from how the last guesses of the same request went."""

from __future__ import annotations

# a guess this likely to be kept is worth its row in the step
_FLOOR = 0.2
_START = 0.7
_WEIGHT = 1 / 8


class DraftLength:
    """At most `longest`; 0 while the share of right guesses, weighted towards the last of them, is below `gate`.

    With rate r, the j-th guess counts with probability r^j; as many are made as keep that at or above a floor.
    """

    def __init__(self, longest: int, *, gate: float, adaptive: bool = True) -> None:
        self._longest = longest
        self._gate = gate
        self._adaptive = adaptive
        self._rate = _START
        self.current = longest if not adaptive else self._length()

    def observe(self, num_right: int, *, missed: bool) -> None:
        """`num_right` guesses in a row were right; the one after them was wrong if `missed`."""
        if not self._adaptive:
            return
        for _ in range(num_right):
            self._rate += (1.0 - self._rate) * _WEIGHT
        if missed:
            self._rate -= self._rate * _WEIGHT
        self.current = self._length()

    def _length(self) -> int:
        if self._rate < self._gate:
            return 0
        length, kept = 0, self._rate
        while length < self._longest and kept >= _FLOOR:
            length += 1
            kept *= self._rate
        return length
