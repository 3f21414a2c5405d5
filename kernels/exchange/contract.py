"""Operands of sums and moves over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """What is done with a sum: it is added to `residual` [T, N] in place, and the norm of that is the result."""

    residual: torch.Tensor
    weight: torch.Tensor
    """[N]"""
    eps: float


class Cut(NamedTuple):
    """How the `num_rows` of a table are cut: `each` a rank, and one more on the first `more`."""

    num_rows: int
    each: int
    more: int
