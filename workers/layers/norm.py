"""Norms over the last dimension of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sempre.kernels.exchange.contract import Norm
from sempre.kernels.norms import add_rms_norm, rms_norm
from sempre.workers.layers.module import Module, Scratch, Tensors
from sempre.workers.layers.row_parallel import Unsummed
from sempre.workers.tensor_source import Parameter


class RMSNorm(Module):
    """Root mean square norm of rows [T, width], times a weight (`kernels.norms`)."""

    weight: torch.Tensor
    """[width]"""

    def __init__(self, width: int, eps: float, *, role: str = "normed") -> None:
        """`role` names the result buffer, shared by all norms of that role and width."""
        self.width = width
        self.eps = eps
        self._role = role

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".weight", Parameter((self.width,), initial="ones")

    def load(self, path: str, tensors: Tensors) -> None:
        self.weight = tensors.vector(path + ".weight")

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield self.weight

    def allocate(self, scratch: Scratch) -> None:
        self._out = scratch.rows(self._role, self.width)

    def shape(self) -> tuple[object, ...]:
        return (self.width, self.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, width], in a buffer that the next norm of this width overwrites."""
        return rms_norm(x, self.weight, self.eps, self._out.first(x.shape[0]))

    def of_sum(self, branch: torch.Tensor | Unsummed | None, residual: torch.Tensor) -> torch.Tensor:
        """Add `branch`, if any, to `residual` [T, width] in place; returns the norm of the sum."""
        if branch is None:
            return self(residual)
        if isinstance(branch, Unsummed):
            return branch.add_and_norm(Norm(residual, self.weight, self.eps), self._out.first(residual.shape[0]))
        return add_rms_norm(branch, residual, self.weight, self.eps, self._out.first(residual.shape[0]))


class OffsetRMSNorm(RMSNorm):
    """Times 1 + the checkpoint's weight; only float32 holds that sum exactly."""

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".weight", Parameter((self.width,), initial="zeros")

    def load(self, path: str, tensors: Tensors) -> None:
        self.weight = tensors.vector(path + ".weight").float() + 1


class HeadNorm(RMSNorm):
    """A norm over each head, which rope computes."""

    def __init__(self, width: int, eps: float, order: Sequence[int] | None = None) -> None:
        """`order`: which dimension of the checkpoint's heads each is; None: the same."""
        super().__init__(width, eps)
        self._order = order

    def load(self, path: str, tensors: Tensors) -> None:
        super().load(path, tensors)
        if self._order is not None:
            self.weight = self.weight[list(self._order)].contiguous()

    def allocate(self, scratch: Scratch) -> None:
        """Nothing: it has no rows of its own."""


class OffsetHeadNorm(HeadNorm, OffsetRMSNorm):
    """The same, times 1 + the checkpoint's weight."""


class ProjectionNorm(HeadNorm):
    """A norm over all heads of a projection together."""
