"""Keys and values that are not finite, for tests of attention on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Damage:
    """One element of one key or value."""

    of: str
    """"key" or "value" """
    amount: float
    dtype: torch.dtype
    """of the cache"""

    def __str__(self) -> str:
        return f"{self.of}-{self.amount}-{str(self.dtype).removeprefix('torch.')}"

    def apply(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Applied to one token's keys and values [Hkv, D], of every head."""
        # in the middle of the head: an edge could be masked by another rule
        amount = torch.tensor(self.amount, dtype=torch.float32).to(keys.dtype)
        (keys if self.of == "key" else values)[:, keys.shape[1] // 2 + 1] = amount


# 1e5 is finite in an activation of float32, and overflows in a cache of float16
DAMAGES = [
    Damage("value", float("nan"), torch.float32),
    Damage("value", float("inf"), torch.bfloat16),
    Damage("value", float("-inf"), torch.float16),
    Damage("value", 1e5, torch.float16),
    Damage("key", float("nan"), torch.bfloat16),
    Damage("key", float("inf"), torch.float32),
    Damage("key", -1e6, torch.float16),
]


def sees(length: int, positions: Sequence[int], window: int | None) -> torch.Tensor:
    """bool [length]: whether the row of a position sees one of `positions`."""
    row = torch.arange(length)
    seen = torch.zeros(length, dtype=torch.bool)
    for position in positions:
        seen |= (row >= position) & (row < position + (window or length))
    return seen
