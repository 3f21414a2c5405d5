"""Pipeline parallelism: contiguous ranges of a model's layers, each on ranks of its own.

Hidden states go from stage to stage, and what the last one samples goes back to the others. Both are moved as they are,
so that the bits are those of one worker with all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sempre.ipc.errors import ConfigError


class StageLink(Protocol):
    """From a rank of one stage to those of its place in the others. Every stage takes part in the same steps, in the
    same order."""

    def pass_on(self, branch: torch.Tensor | None, residual: torch.Tensor) -> None:
        """Hand hidden states [T, H] to the next stage: the branch still to be added, if any, and the residual
        stream."""

    def take_over(self, branch: torch.Tensor, residual: torch.Tensor) -> bool:
        """Fill both with what the stage before passed on; whether there is a branch. Raises ProtocolError for another
        number of rows, and EngineUnhealthy."""

    def report(self, outcome: bytes) -> None:
        """Tell all earlier stages what the last one sampled."""

    def has_report(self, wait_s: float) -> bool:
        """Whether `next_report` would not wait, after waiting for up to `wait_s`."""

    def next_report(self) -> bytes:
        """Wait for what the last stage tells. Raises EngineUnhealthy."""


@dataclass(frozen=True)
class Stage:
    """A worker's place among the `count` stages of its replica."""

    index: int = 0
    count: int = 1
    link: StageLink | None = None
    """None: the worker has all layers"""

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head, and samples."""
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """This stage's layers; earlier stages may have one more. Raises ConfigError where there are too few."""
        if num_layers < self.count:
            raise self.refused(f"at most the model's {num_layers} layers")
        each, more = divmod(num_layers, self.count)
        first = self.index * each + min(self.index, more)
        return range(first, first + each + (self.index < more))

    def refused(self, expected: str) -> ConfigError:
        """The error of a model that so many stages cannot share."""
        return ConfigError(
            f"pipeline_parallel_size: stage {self.index}: expected {expected}, found {self.count}.",
            parameter="pipeline_parallel_size",
            value=self.count,
        )


ALL_LAYERS = Stage()
"""The only stage."""
