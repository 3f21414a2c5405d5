"""The linear layers of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.linear import ControlLinearWeight, GpuLinearWeight, WeightGroup, group_weights
from sempre.kernels.moe import ExpertWeights, stack_like
from sempre.workers.layers.linear import Linear, tensors_of_weight
from sempre.workers.layers.linear_kernel import LinearWeight
from sempre.workers.layers.module import Build, Scratch, Tensors
from sempre.workers.quantization.plain import PLAIN_SUFFIX
from sempre.workers.tensor_source import Parameter


class ExpertLinear(Linear):
    """The same layer of several experts; `path`'s parent holds one of the checkpoint's modules for each, by number.

    On a CPU, `weights` has one per expert; a GPU holds all in `stacked`. `weight` is one expert's, for callers that
    ask which kernels it uses.
    """

    stacked: ExpertWeights | None = None
    group: WeightGroup | None = None
    """all on a CPU, if they are floats and alike"""

    def __init__(
        self,
        build: Build,
        num_experts: int,
        parts: Mapping[str, int],
        in_features: int,
        *,
        role: str = "branch",
        activation: Activation | None = None,
    ) -> None:
        super().__init__(build, parts, in_features, role=role, activation=activation)
        self.num_experts = num_experts
        self.own = build.parallel.own_experts(num_experts)
        """the experts that this rank has"""
        self.weights: list[LinearWeight] = []

    def _paths(self, path: str) -> list[str]:
        parent, _, name = path.rpartition(".")
        return [f"{parent}.{expert}.{name}" if parent else f"{expert}.{name}" for expert in range(self.num_experts)]

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        for expert in self._paths(path):
            yield from super().own_parameters(expert)

    def load(self, path: str, tensors: Tensors) -> None:
        paths = self._paths(path)
        for expert in self.own:
            super().load(paths[expert], tensors)
            self.put(expert, self.weight)

    def put(self, expert: int, weight: LinearWeight) -> None:
        """Store the weight of one expert; called in ascending order of experts."""
        if isinstance(weight, GpuLinearWeight | ControlLinearWeight) and weight.weight.is_cuda:
            # one at a time, so that a model's largest tensors never exist twice
            if expert == self.own.start:
                self.stacked = stack_like(weight, len(self.own))
            assert self.stacked is not None
            self.weight = self.stacked.put(expert - self.own.start, weight)
        else:
            self.weights.append(weight)
            self.weight = self.weights[0]

    def own_tensors(self) -> Iterator[torch.Tensor]:
        for weight in [self.stacked] if self.stacked is not None else self.weights:
            yield from tensors_of_weight(weight)

    def allocate(self, scratch: Scratch) -> None:
        if self.stacked is None:
            self.group = group_weights(self.weights)
            super().allocate(scratch)

    def shape(self) -> tuple[object, ...]:
        return (*super().shape(), self.num_experts)

    def of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's result [T, N] on a CPU, in the buffer of this role."""
        return self.kernel.linear(x, self.weights[expert - self.own.start], self._out.first(x.shape[0]))

    def gated_of(self, expert: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Likewise `gated`."""
        self.kernel.gated_linear(
            x, self.weights[expert - self.own.start], self._out.first(x.shape[0]), out, self.activation
        )
        return out


class StackedExpertLinear(ExpertLinear):
    """The same, where one tensor of the checkpoint holds all experts: at `path` [E, K, N], or in a format of fewer bits
    with N before K; the bias is at `path` with `_bias`."""

    def __init__(
        self,
        build: Build,
        num_experts: int,
        name: str,
        order: Sequence[int],
        in_features: int,
        *,
        role: str = "branch",
        activation: Activation | None = None,
    ) -> None:
        """`order`: which output of the checkpoint each is."""
        super().__init__(build, num_experts, {name: len(order)}, in_features, role=role, activation=activation)
        self.bias = True
        self._order = order

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        experts, outputs = self.num_experts, self.out_features
        for suffix, parameter in self._stored(path).items():
            shape = (self.in_features, outputs) if suffix == PLAIN_SUFFIX else parameter.shape
            yield _stacked(path, suffix), replace(parameter, shape=(experts, *shape))
        yield path + "_bias", Parameter((experts, outputs), initial="zeros")

    def load(self, path: str, tensors: Tensors) -> None:
        method = self._quantization.method([path])
        stored = {suffix: tensors.read(_stacked(path, suffix)) for suffix in self._stored(path)}
        stored = {suffix: t.transpose(1, 2) if suffix == PLAIN_SUFFIX else t for suffix, t in stored.items()}
        biases = tensors.vector(path + "_bias")
        order = torch.tensor(self._order, dtype=torch.int64, device=biases.device)
        for expert in self.own:
            own = {suffix: tensor[expert].index_select(0, order) for suffix, tensor in stored.items()}
            bias = biases[expert].index_select(0, order)
            self.put(expert, method.pack({path: own}, bias, self.kernel, tensors.matrix))

    def _stored(self, path: str) -> Mapping[str, Parameter]:
        return self._quantization.method([path]).tensors(path, self.out_features, self.in_features)


def _stacked(path: str, suffix: str) -> str:
    """A tensor of all experts has no suffix where that of one matrix has the usual."""
    return path if suffix == PLAIN_SUFFIX else path + suffix
