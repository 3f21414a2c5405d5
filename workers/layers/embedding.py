"""Token ids to rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sempre.kernels.embedding import embed
from sempre.workers.layers.module import Module, Scratch, Tensors
from sempre.workers.tensor_source import Parameter


class Embedding(Module):
    """A table [V, H], in the dtype of matrices."""

    weight: torch.Tensor

    def __init__(self, num_rows: int, width: int, *, role: str = "residual") -> None:
        """`role` names the result buffer."""
        self.num_rows = num_rows
        self.width = width
        self._role = role

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".weight", Parameter((self.num_rows, self.width))

    def load(self, path: str, tensors: Tensors) -> None:
        # a copy: a view would keep the whole file mapped
        stored = tensors.matrix(tensors.read(path + ".weight"))
        self.weight = stored.clone(memory_format=torch.contiguous_format)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield self.weight

    def allocate(self, scratch: Scratch) -> None:
        self._out = scratch.rows(self._role, self.width)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] → [T, H], in the buffer of this role: the residual stream of the step."""
        return embed(token_ids, self.weight, self._out.first(token_ids.shape[0]))
