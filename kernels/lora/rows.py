"""Which adapter each row of a step has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# rows of one adapter that a CPU computes at a time: the largest register tile
GROUP_ROWS = 12


@dataclass(frozen=True)
class AdapterRows:
    """The slots of a step's rows, and on a CPU its rows by slot."""

    slots: torch.Tensor
    """int32 [T]; -1: without an adapter"""
    order: torch.Tensor | None = None
    """int64: the rows that have one, by slot, ascending"""
    groups: torch.Tensor | None = None
    """int64 [G, 3]: slot, first entry of `order`, number of entries, at most GROUP_ROWS"""


def adapter_rows(slots: torch.Tensor) -> AdapterRows:
    """For int32 `slots` [T] on either device."""
    if slots.is_cuda:
        return AdapterRows(slots)
    values = slots.numpy()
    order = np.flatnonzero(values >= 0)
    order = order[np.argsort(values[order], kind="stable")]
    used, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    groups = [
        (slot, first, min(GROUP_ROWS, start + count - first))
        for slot, start, count in zip(used.tolist(), starts.tolist(), counts.tolist(), strict=True)
        for first in range(start, start + count, GROUP_ROWS)
    ]
    return AdapterRows(
        slots, torch.from_numpy(order), torch.tensor(groups, dtype=torch.int64, device="cpu").view(-1, 3)
    )
