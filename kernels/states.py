"""States of layers that fold a sequence into memory of fixed size, and which of them the rows of a step read and write.

# R requests, T rows (tokens), S slots, Hv value heads, Dk and Dv their dimensions, C channels, K taps of a convolution
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
    conv_channels: int
    conv_taps: int
    """the convolution reads a row and this many less one before it"""

    def nbytes(self, activations: torch.dtype) -> int:
        """Of one slot."""
        recurrent = self.num_heads * self.key_dim * self.value_dim * torch.float32.itemsize
        return recurrent + self.conv_channels * (self.conv_taps - 1) * activations.itemsize


@dataclass(frozen=True)
class LayerState:
    """One layer's states, by slot."""

    recurrent: torch.Tensor
    """float32 [S, Hv, Dk, Dv]"""
    conv: torch.Tensor
    """activations [S, C, K - 1]: inputs of the convolution, the latest last"""


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

    def __post_init__(self) -> None:
        check_index("StateBatch", "reads", self.reads, torch.int32)
        check_index("StateBatch", "writes", self.writes, torch.int32)


def allocate_layer_state(
    shape: StateShape, num_slots: int, activations: torch.dtype, device: torch.device
) -> LayerState:
    """Zeros."""
    heads = (num_slots, shape.num_heads, shape.key_dim, shape.value_dim)
    conv = (num_slots, shape.conv_channels, shape.conv_taps - 1)
    return LayerState(
        torch.zeros(heads, dtype=torch.float32, device=device), torch.zeros(conv, dtype=activations, device=device)
    )
