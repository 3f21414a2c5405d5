"""Inputs of a gated delta layer: heads, weights, the states of requests, and the slots that a step reads and writes.

# R requests, T rows, K key heads, V value heads, Dk and Dv their dimensions, W width of the convolution
# C = 2 K Dk + V Dv channels: queries, keys, values
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sempre.kernels.checks import check_index


@dataclass(frozen=True)
class DeltaHeads:
    """The heads of a layer, and so the shape of its states."""

    num_key_heads: int
    """queries have as many"""
    num_value_heads: int
    """a multiple of the key heads; value head v belongs to key head v // (V / K)"""
    key_dim: int
    """a multiple of 16"""
    value_dim: int
    """a multiple of 16"""
    conv_width: int
    """a channel's result depends on this many inputs, the row's own included; at least 2"""

    @property
    def channels(self) -> int:
        """C"""
        return 2 * self.num_key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        """V Dv"""
        return self.num_value_heads * self.value_dim

    @property
    def recurrent_shape(self) -> tuple[int, int, int]:
        return (self.num_value_heads, self.key_dim, self.value_dim)

    @property
    def conv_shape(self) -> tuple[int, int]:
        return (self.conv_width - 1, self.channels)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one slot, where activations are of `dtype`."""
        return 4 * math.prod(self.recurrent_shape) + dtype.itemsize * math.prod(self.conv_shape)


@dataclass(frozen=True)
class LayerState:
    """One layer's part of all state slots. ValueError unless both are contiguous.

    What a slot holds is read only after it was written.
    """

    recurrent: torch.Tensor
    """float32 [slots, V, Dk, Dv]"""
    conv: torch.Tensor
    """[slots, W - 1, C]: the last inputs of the convolution, oldest first, in the dtype of activations"""

    def __post_init__(self) -> None:
        if not (self.recurrent.is_contiguous() and self.conv.is_contiguous()):
            raise ValueError("LayerState: expected contiguous tensors")


def allocate_layer_state(heads: DeltaHeads, num_slots: int, dtype: torch.dtype, device: torch.device) -> LayerState:
    """Slots of zeros."""
    return LayerState(
        torch.zeros(num_slots, *heads.recurrent_shape, dtype=torch.float32, device=device),
        torch.zeros(num_slots, *heads.conv_shape, dtype=dtype, device=device),
    )


@dataclass(frozen=True)
class StateBatch:
    """Which slots the requests of a step read and write. ValueError unless the arrays are contiguous int32.

    A slot that a request writes is read by no other request of the step.
    """

    reads: torch.Tensor
    """int32 [R]: the slot with the state before the request's first row; -1: zeros, as before position 0"""
    writes: torch.Tensor
    """int32 [T]: the slot that takes the state after the row; -1: none"""
    query_starts: torch.Tensor
    """int32 [R + 1]: rows [query_starts[r], query_starts[r + 1]) belong to request r"""

    def __post_init__(self) -> None:
        for name in ("reads", "writes", "query_starts"):
            check_index("StateBatch", name, getattr(self, name), torch.int32)


@dataclass(frozen=True)
class DeltaWeights:
    """The weights of a layer, beside its projections; all float32."""

    heads: DeltaHeads
    conv: torch.Tensor
    """[W, C], the oldest input first"""
    rate: torch.Tensor
    """[V]: the logarithm of a head's decay is rate * softplus(a + offset); negative"""
    offset: torch.Tensor
    """[V]"""
    norm: torch.Tensor
    """[Dv]"""
    eps: float
    """of that norm"""
