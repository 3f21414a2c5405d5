"""Observations counted by size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Observations:
    """Counts of values between `bounds`; beyond the last of them is infinity."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, observations up to it) in ascending order, as Prometheus writes them."""
        total = 0
        buckets = []
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound is None else str(float(bound)), float(total)))
        return buckets
