"""A linear layer: one or more of the checkpoint's projections, fused, in any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.linear import ControlLinearWeight, GpuLinearWeight
from sempre.kernels.moe import ExpertWeights, stack_like
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear_kernel import LinearWeight
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.quantization.plain import PLAIN_SUFFIX
from sempre.workers.tensor_source import Parameter


class Use(Enum):
    """What it is used for: decides which of the kernels for its shape compute it."""

    PLAIN = "plain"
    LOGITS = "logits"
    """the vocabulary's: results are float32, in the caller's buffer"""
    ROUTER = "router"
    """likewise, for every row of a step"""

    @property
    def is_float32(self) -> bool:
        """Whether results are float32 whatever the dtype of activations is."""
        return self in (Use.LOGITS, Use.ROUTER)


class Linear(Module):
    """x [T, K] → [T, N]. `parts`: names of the checkpoint's projections, which are siblings, with their N."""

    weight: LinearWeight
    rows_of_token = 1
    """at most this many rows of x per token of a step"""

    def __init__(
        self,
        build: Build,
        parts: Mapping[str, int],
        in_features: int,
        *,
        bias: bool = False,
        use: Use = Use.PLAIN,
        role: str = "branch",
        activation: Activation | None = None,
    ) -> None:
        """`role` names the result buffer, shared by all layers of that role and N. `activation` is that of `gated`."""
        self.parts = dict(parts)
        self.in_features = in_features
        self.out_features = sum(parts.values())
        self.bias = bias
        self.use = use
        self.activation = activation
        self.kernel = build.kernel
        self._role = role
        self._quantization = build.quantization

    def modules(self, path: str) -> list[str]:
        """The projections' names in the checkpoint."""
        parent = path.rpartition(".")[0]
        return [f"{parent}.{part}" if parent else part for part in self.parts]

    @property
    def stored(self) -> Mapping[str, int]:
        """How many rows the checkpoint has of each part."""
        return self.parts

    @property
    def multiplications(self) -> int:
        """For one row of x."""
        return self.in_features * self.out_features

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        modules = self.modules(path)
        method = self._quantization.method(modules)
        for module, rows in zip(modules, self.stored.values(), strict=True):
            for suffix, parameter in method.tensors(rows, self.in_features).items():
                yield module + suffix, parameter
            if self.bias:
                yield module + ".bias", Parameter((rows,), initial="zeros")

    def load(self, path: str, tensors: Tensors) -> None:
        modules = self.modules(path)
        method = self._quantization.method(modules)
        bias = torch.cat([tensors.vector(module + ".bias") for module in modules]) if self.bias else None
        parts = {
            module: {suffix: tensors.read(module + suffix) for suffix in method.tensors(rows, self.in_features)}
            for module, rows in zip(modules, self.stored.values(), strict=True)
        }
        self.weight = method.pack(parts, bias, self.kernel, tensors.matrix)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        for value in vars(self.weight).values():
            if isinstance(value, torch.Tensor):
                yield value

    def allocate(self, scratch: Scratch) -> None:
        if not self.use.is_float32:
            self._out = scratch.rows(self._role, self.out_features)

    def shape(self) -> tuple[object, ...]:
        return (self.out_features, self.in_features, self.bias, self.weight.scheme)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, N], in the buffer of this role."""
        return self.into(x, self._out.first(x.shape[0]))

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write to, and return, `out` [T, N]."""
        return self.kernel.linear(x, self.weight, out)

    def gated(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """activation(first half) * second half of the result, into `out` [T, N / 2]."""
        self.kernel.gated_linear(x, self.weight, self._out.first(x.shape[0]), out, self.activation)
        return out


class HeadsLinear(Linear):
    """Heads side by side. The checkpoint may have their dimensions in another order, or them among other rows."""

    _order: torch.Tensor | None = None
    _taken: Mapping[str, torch.Tensor] = {}
    _stored: Mapping[str, int] = {}

    def reorder(self, order: Sequence[int], num_heads: int) -> None:
        """Of the first `num_heads` heads: which dimension of the checkpoint each is."""
        rows = torch.arange(self.out_features, dtype=torch.int64, device="cpu")
        turned = rows[: num_heads * len(order)].view(num_heads, len(order))[:, list(order)]
        self._order = torch.cat([turned.reshape(-1), rows[turned.numel() :]])

    def take(self, part: str, rows: torch.Tensor, *, of: int) -> None:
        """Of a part: which of the checkpoint's `of` rows are the layer's."""
        self._taken = {**self._taken, part: rows}
        self._stored = {**self._stored, part: of}

    @property
    def stored(self) -> Mapping[str, int]:
        return {**self.parts, **self._stored}

    def load(self, path: str, tensors: Tensors) -> None:
        if self._order is not None or self._taken:
            tensors = _Reordered(tensors, self._checkpoint_rows(path))
        super().load(path, tensors)

    def _checkpoint_rows(self, path: str) -> dict[str, torch.Tensor]:
        """By module: which row of the checkpoint's each is."""
        all_rows, start = {}, 0
        for module, (part, count) in zip(self.modules(path), self.parts.items(), strict=True):
            rows = torch.arange(count, dtype=torch.int64, device="cpu")
            if self._order is not None:
                rows = self._order[start : start + count] - start
            all_rows[module] = self._taken[part][rows] if part in self._taken else rows
            start += count
        return all_rows


class _Reordered:
    """Tensors of which some rows are read, in another order, by their module."""

    def __init__(self, tensors: Tensors, rows: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._rows = rows
        self.matrix = tensors.matrix

    def read(self, name: str) -> torch.Tensor:
        return self._reordered(name, self._tensors.read(name))

    def vector(self, name: str) -> torch.Tensor:
        return self._reordered(name, self._tensors.vector(name))

    def _reordered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == 1:
            return tensor  # one scale of all rows
        # bytes: not every device takes rows of fp8
        whole = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        return whole.index_select(0, self._rows[name.rpartition(".")[0]].to(tensor.device)).view(tensor.dtype)


class ExpertLinear(Linear):
    """The same layer of several experts; `path`'s parent holds one of the checkpoint's modules for each, by number.

    On a CPU, `weights` has one per expert; a GPU holds all in `stacked`. `weight` is one expert's, for callers that
    ask which kernels it uses.
    """

    stacked: ExpertWeights | None = None

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
        self.weights: list[LinearWeight] = []

    def _paths(self, path: str) -> list[str]:
        parent, _, name = path.rpartition(".")
        return [f"{parent}.{expert}.{name}" if parent else f"{expert}.{name}" for expert in range(self.num_experts)]

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        for expert in self._paths(path):
            yield from super().own_parameters(expert)

    def load(self, path: str, tensors: Tensors) -> None:
        for expert, expert_path in enumerate(self._paths(path)):
            super().load(expert_path, tensors)
            self.put(expert, self.weight)

    def put(self, expert: int, weight: LinearWeight) -> None:
        """Store the weight of one expert; called in ascending order of experts."""
        if isinstance(weight, GpuLinearWeight | ControlLinearWeight) and weight.weight.is_cuda:
            # one at a time, so that a model's largest tensors never exist twice
            if expert == 0:
                self.stacked = stack_like(weight, self.num_experts)
            assert self.stacked is not None
            self.weight = self.stacked.put(expert, weight)
        else:
            self.weights.append(weight)
            self.weight = self.weights[0]

    def own_tensors(self) -> Iterator[torch.Tensor]:
        for weight in [self.stacked] if self.stacked is not None else self.weights:
            yield from (value for value in vars(weight).values() if isinstance(value, torch.Tensor))

    def allocate(self, scratch: Scratch) -> None:
        if self.stacked is None:
            super().allocate(scratch)

    def shape(self) -> tuple[object, ...]:
        return (*super().shape(), self.num_experts)

    def of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's result [T, N] on a CPU, in the buffer of this role."""
        return self.kernel.linear(x, self.weights[expert], self._out.first(x.shape[0]))

    def gated_of(self, expert: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Likewise `gated`."""
        self.kernel.gated_linear(x, self.weights[expert], self._out.first(x.shape[0]), out, self.activation)
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
        for expert in range(self.num_experts):
            own = {suffix: tensor[expert].index_select(0, order) for suffix, tensor in stored.items()}
            bias = biases[expert].index_select(0, order)
            self.put(expert, method.pack({path: own}, bias, self.kernel, tensors.matrix))

    def _stored(self, path: str) -> Mapping[str, Parameter]:
        return self._quantization.method([path]).tensors(self.out_features, self.in_features)


def _stacked(path: str, suffix: str) -> str:
    """A tensor of all experts has no suffix where that of one matrix has the usual."""
    return path if suffix == PLAIN_SUFFIX else path + suffix


class TiedLinear(Linear):
    """Logits from the embedding's table, which is already loaded; reads no tensor of its own."""

    def __init__(self, build: Build, embedding: Embedding) -> None:
        super().__init__(build, {"lm_head": embedding.num_rows}, embedding.width, use=Use.LOGITS)
        self._embedding = embedding

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        return iter(())

    def load(self, path: str, tensors: Tensors) -> None:
        self.weight = self.kernel.pack(self._embedding.weight, None)


class TokenLinear(Linear):
    """The logits of a few tokens: rows of the vocabulary's head, or of the embedding's table, which is loaded."""

    def __init__(
        self, build: Build, tokens: Sequence[int], head_shape: tuple[int, int], table: Embedding | None
    ) -> None:
        super().__init__(build, {"score": len(tokens)}, head_shape[1], use=Use.LOGITS)
        self._tokens = list(tokens)
        self._head_shape = head_shape
        self._table = table

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        if self._table is None:
            yield "lm_head.weight", Parameter(self._head_shape)

    def load(self, path: str, tensors: Tensors) -> None:
        if self._table is None:
            rows = tensors.matrix(tensors.read("lm_head.weight")[self._tokens])
        else:
            rows = self._table.weight[self._tokens]
        self.weight = self.kernel.pack(rows.contiguous(), None)
