"""Which adapters the rows of the current step have, for the linear layers that compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sempre.kernels.lora import AdapterRows


@dataclass(frozen=True)
class StepAdapters:
    """Of a step in which some row has an adapter."""

    all_rows: AdapterRows
    """[T]"""
    read: AdapterRows | None
    """[S]: of the rows that are read; None: all are"""


class CurrentAdapters:
    """Shared by the layers of one tree; set before the step is computed."""

    def __init__(self) -> None:
        self.step: StepAdapters | None = None

    def of(self, num_rows: int) -> AdapterRows | None:
        """For a layer that computes all rows of the step, or those that are read; None: no row has an adapter."""
        if self.step is None:
            return None
        for rows in (self.step.all_rows, self.step.read):
            if rows is not None and rows.slots.shape[0] == num_rows:
                return rows
        raise AssertionError(f"a layer of {num_rows} rows, which are neither all rows nor those that are read")


class AdapterPart(NamedTuple):
    """One projection of the checkpoint within a linear layer."""

    module: str
    """its name in the checkpoint"""
    num_stored: int
    """rows that the checkpoint has of it"""
    rows: torch.Tensor | None
    """int64: which of them the layer has, in its order; None: all, in theirs"""
