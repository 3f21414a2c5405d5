"""States of layers that fold a sequence into memory of fixed size, and which of them the rows of a step read and write.

# R requests, T rows (tokens), S slots, V value heads, Dk and Dv their dimensions, C channels, W width of a convolution
A slot holds the states of one sequence after one of its tokens, in every such layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sempre.kernels.checks import check_index


class StateShape(NamedTuple):
    """The state of one layer."""

    num_heads: int
    """value heads"""
    key_dim: int
    value_dim: int
    channels: int
    """of the convolution"""
    conv_width: int
    """the convolution's result for a row depends on this many rows, its own included; at least 2"""

    def nbytes(self, activations: torch.dtype) -> int:
        """Of one slot."""
        recurrent = self.num_heads * self.key_dim * self.value_dim * torch.float32.itemsize
        return recurrent + (self.conv_width - 1) * self.channels * activations.itemsize


@dataclass(frozen=True)
class LayerState:
    """One layer's part of all slots, each read only after it was written. ValueError unless both are contiguous."""

    recurrent: torch.Tensor
    """float32 [S, V, Dk, Dv]"""
    conv: torch.Tensor
    """[S, W - 1, C]: the last inputs of the convolution, oldest first, in the dtype of activations"""

    def __post_init__(self) -> None:
        if not (self.recurrent.is_contiguous() and self.conv.is_contiguous()):
            raise ValueError("LayerState: expected contiguous tensors")


@dataclass(frozen=True)
class StateBatch:
    """Where the requests of a step find their states, and where the rows leave theirs. ValueError unless the arrays are
    contiguous int32.

    A row may write to the slot that its own request reads, and several rows of a request may write, each to another
    slot; no slot is written by one request and read or written by another in the same step.
    """

    reads: torch.Tensor
    """int32 [R]: the state before the request's first row; -1: that of no token, all zeros"""
    writes: torch.Tensor
    """int32 [T]: where the state after the row goes; -1: nowhere"""
    query_starts: torch.Tensor
    """int32 [R + 1]: rows [query_starts[r], query_starts[r + 1]) belong to request r"""

    def __post_init__(self) -> None:
        for name in ("reads", "writes", "query_starts"):
            check_index("StateBatch", name, getattr(self, name), torch.int32)


def allocate_layer_state(
    shape: StateShape, num_slots: int, activations: torch.dtype, device: torch.device
) -> LayerState:
    """Zeros."""
    heads = (num_slots, shape.num_heads, shape.key_dim, shape.value_dim)
    conv = (num_slots, shape.conv_width - 1, shape.channels)
    return LayerState(
        torch.zeros(heads, dtype=torch.float32, device=device), torch.zeros(conv, dtype=activations, device=device)
    )
