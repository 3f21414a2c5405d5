"""Inputs of a gated delta layer: its heads and weights.

# K key heads, V value heads, Dk and Dv their dimensions, W width of the convolution
# C = 2 K Dk + V Dv channels: queries, keys, values
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.kernels.states import StateShape


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
    def states(self) -> StateShape:
        return StateShape(self.num_value_heads, self.key_dim, self.value_dim, self.channels, self.conv_width)


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
