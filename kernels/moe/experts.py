"""Weights and memory of a mixture of experts. T rows, E experts, K experts a row, P = T K, N out, D in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.linear.weights import ControlLinearWeight, GpuLinearWeight, WeightGroup


@dataclass(frozen=True)
class ExpertWeights:
    """One linear layer of all experts on a GPU: `weight` [E, N, D], `bias` [E, N] or None, and where the weight is fp8,
    `scheme` and `scale` [E, N] float32."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    scheme: Fp8Scheme | None = None
    bias: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return int(self.weight.shape[0])

    def put(self, expert: int, w: GpuLinearWeight | ControlLinearWeight) -> GpuLinearWeight | ControlLinearWeight:
        """Copy one expert's weight here; returns it as a view of this."""
        own = self.weight[expert]
        # bytes: not every device copies fp8
        own.view(torch.uint8).copy_(w.weight.view(torch.uint8))
        bias = self.bias[expert].copy_(w.bias) if self.bias is not None and w.bias is not None else None
        if self.scale is None or isinstance(w, ControlLinearWeight):
            return replace(w, weight=own, bias=bias)
        assert w.scale is not None
        return replace(w, weight=own, bias=bias, scale=self.scale[expert].copy_(w.scale))


def stack_like(w: GpuLinearWeight | ControlLinearWeight, num_experts: int) -> ExpertWeights:
    """Room for `num_experts` weights like this one."""

    def room(part: torch.Tensor | None) -> torch.Tensor | None:
        return part.new_empty(num_experts, *part.shape) if part is not None else None

    weight = w.weight.new_empty(num_experts, *w.weight.shape)
    if isinstance(w, ControlLinearWeight):
        return ExpertWeights(weight, bias=room(w.bias))
    return ExpertWeights(weight, room(w.scale), w.scheme, room(w.bias))


class GatedExperts(NamedTuple):
    """On a GPU: down(activation(gate(x)) * up(x)) of each expert."""

    gate_up: ExpertWeights
    """[E, 2 I, H], gates first"""
    down: ExpertWeights
    """[E, H, I]"""
    activation: Activation = Activation.SILU
    factors: torch.Tensor | None = None
    """float32 [E]: the experts' weights in the sum are multiplied by them"""


class GroupedExperts(NamedTuple):
    """The same on a CPU."""

    gate_up: WeightGroup
    """of [2 I, H], gates first"""
    down: WeightGroup
    """of [H, I]"""
    activation: Activation
    first: int
    """number of the first expert; the others follow"""


class ExpertRows(NamedTuple):
    """Memory on a CPU; no more is used than rows that these experts have."""

    gate_up: torch.Tensor
    """float32 [P, 2 I]"""
    activated: torch.Tensor
    """float32 [P, I]"""


class ExpertShape(NamedTuple):
    """Sizes of a mixture."""

    num_experts: int
    experts_per_row: int
    hidden_size: int
    intermediate_size: int


class SigmoidScores(NamedTuple):
    """Scores of experts that are sigmoids of their logits, instead of a softmax; a bias corrects who is chosen."""

    bias: torch.Tensor
    """float32 [E], added to the scores for choosing only"""
    num_groups: int
    """of experts of adjacent numbers, all as large"""
    kept_groups: int
    """groups that a row chooses from: those with the greatest sums of their two best"""
    scale: float
    """of the weights"""


@dataclass(frozen=True)
class ExpertScratch:
    """Memory on a GPU for a step; layers of one shape, which run one after the other, share it."""

    experts: torch.Tensor
    """int32 [T, K]"""
    weights: torch.Tensor
    """float32 [T, K]"""
    counts: torch.Tensor
    order: torch.Tensor
    tiles: torch.Tensor
    """int32, of the sort"""
    activated: torch.Tensor
    """[P, intermediate size], in the dtype of activations"""
    parts: torch.Tensor
    """float32 [P, hidden size]"""
