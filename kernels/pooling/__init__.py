"""Sums of rows for pooling: sums[slot] += hidden[row], in float64, one row after the other in ascending order.

Contract: a request's rows are added in the order of their positions, each element by itself, so a sum depends neither
on the other requests nor on where the prompt was cut into chunks. A request that begins starts from 0. In float64 the
result is exact for one row, and the same on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sempre.kernels.checks import check_index
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.pooling import cpu as _cpu
    from sempre.kernels.pooling import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["RowSpans", "add_rows"]


class RowSpans(NamedTuple):
    """The rows of each request, int64 [R] each; a request without any has an empty span."""

    first: torch.Tensor
    end: torch.Tensor
    slots: torch.Tensor
    """of its sum; no two requests have the same"""
    begins: torch.Tensor
    """1: its sum starts from 0"""


def add_rows(hidden: torch.Tensor, spans: RowSpans, sums: torch.Tensor) -> torch.Tensor:
    """Add rows of hidden [T, H] to the requests' rows of sums, float64 [N, H]. Returns `sums`."""
    for name, values in zip(RowSpans._fields, spans, strict=True):
        check_index("add_rows", name, values, torch.int64)
    if sums.dtype != torch.float64 or sums.shape[1:] != hidden.shape[1:] or not hidden.is_contiguous():
        raise ValueError(
            f"add_rows: sums {sums.dtype} {tuple(sums.shape)} do not fit contiguous rows {tuple(hidden.shape)}"
        )
    if not hidden.is_cuda:
        return _cpu.add_rows(hidden, spans, sums)
    return _gpu.add_rows(hidden, spans, sums)
