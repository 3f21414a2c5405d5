"""Where a later stage's layers begin: the hidden states of the stage before."""

from __future__ import annotations

import torch

from sempre.workers.layers.module import Module, Scratch
from sempre.workers.stages import Stage
from sempre.workers.steps import StepInput, rows_read


def sums_read(branch: torch.Tensor | None, residual: torch.Tensor, step: StepInput) -> torch.Tensor:
    """The hidden states between two layers, of the rows that are read [S, H]."""
    rows = rows_read(residual, step)
    return rows.clone() if branch is None else rows + rows_read(branch, step)


class StageInput(Module):
    """In place of the embedding; the same buffers have a branch and the residual stream as between any two layers."""

    received: torch.Tensor
    """of the last step: the hidden states of the rows that are read [S, H], as they came"""

    def __init__(self, stage: Stage, width: int) -> None:
        assert stage.link is not None
        self._link = stage.link
        self._width = width

    def allocate(self, scratch: Scratch) -> None:
        self._branch = scratch.rows("stage branch", self._width)
        self._residual = scratch.rows("residual", self._width)

    def __call__(self, step: StepInput) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The branch still to be added [T, H], if any, and the residual stream [T, H]."""
        count = step.positions.shape[0]
        branch, residual = self._branch.first(count), self._residual.first(count)
        found = branch if self._link.take_over(branch, residual) else None
        self.received = sums_read(found, residual, step)
        return found, residual
