"""A linear layer: one or more of the checkpoint's projections, fused, in any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.lora import AdapterRows, LoraSlots, add_adapters
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.layers.lora import AdapterPart
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.tensor_source import Parameter

# of a step's rows that have adapters on a GPU: so many at a time, whose float32 results are scratch
_ROWS_AT_ONCE = 2048


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
    _taken: Mapping[str, torch.Tensor] = {}
    _stored_rows: Mapping[str, int] = {}
    adapters: LoraSlots | None = None
    """those that rows of a step may have"""

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

    def take(self, part: str, rows: torch.Tensor, *, of: int) -> None:
        """Of a part: which of the checkpoint's `of` rows are the layer's."""
        self._taken = {**self._taken, part: rows}
        self._stored_rows = {**self._stored_rows, part: of}

    @property
    def stored(self) -> Mapping[str, int]:
        """How many rows the checkpoint has of each part."""
        return {**self.parts, **self._stored_rows}

    @property
    def stored_inputs(self) -> int:
        """How many inputs the checkpoint has."""
        return self.in_features

    @property
    def _packing(self) -> LinearKernel:
        """How matrices are packed."""
        return self.kernel

    @property
    def multiplications(self) -> int:
        """For one row of x."""
        return self.in_features * self.out_features

    @property
    def stores_float32(self) -> bool:
        """Whether the matmul's results are float32 on a GPU."""
        return self.use.is_float32

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        modules = self.modules(path)
        method = self._quantization.method(modules)
        for module, rows in zip(modules, self.stored.values(), strict=True):
            for suffix, parameter in method.tensors(module, rows, self.stored_inputs).items():
                yield module + suffix, parameter
            if self.bias:
                yield module + ".bias", Parameter((rows,), initial="zeros")

    def load(self, path: str, tensors: Tensors) -> None:
        if reordered := self._checkpoint_rows(path):
            tensors = _Reordered(tensors, reordered)
        modules = self.modules(path)
        method = self._quantization.method(modules)
        bias = torch.cat([tensors.vector(module + ".bias") for module in modules]) if self.bias else None
        parts = {
            module: {
                suffix: tensors.read(module + suffix) for suffix in method.tensors(module, rows, self.stored_inputs)
            }
            for module, rows in zip(modules, self.stored.values(), strict=True)
        }
        self.weight = method.pack(parts, bias, self._packing, tensors.matrix)

    def _checkpoint_rows(self, path: str) -> dict[str, torch.Tensor]:
        """By module: which row of the checkpoint's each is; empty where all are as they are."""
        modules = zip(self.modules(path), self.parts, strict=True)
        return {module: self._taken[part] for module, part in modules if part in self._taken}

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield from tensors_of_weight(self.weight)

    def allocate(self, scratch: Scratch) -> None:
        if not self.use.is_float32:
            self._out = scratch.rows(self._role, self.out_features)
        if self.adapters is not None:
            self._current = scratch.adapters
            self.adapters.allocate(scratch.tensor, scratch.max_tokens)
            if scratch.activations != torch.float32:
                size = min(scratch.max_tokens, _ROWS_AT_ONCE), self.out_features
                self._base = scratch.tensor("adapted base", size, torch.float32)

    def shape(self) -> tuple[object, ...]:
        return (self.out_features, self.in_features, self.bias, self.weight.scheme)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, N], in the buffer of this role."""
        return self.into(x, self._out.first(x.shape[0]))

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write to, and return, `out` [T, N]."""
        rows = self._adapter_rows(x)
        if rows is not None:
            return self._adapted(x, rows, out)
        return self.kernel.linear(x, self.weight, out)

    def gated(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """activation(first half) * second half of the result, into `out` [T, N / 2]."""
        rows = self._adapter_rows(x)
        if rows is not None:
            assert self.activation is not None
            return self.activation.and_mul(self._adapted(x, rows, self._out.first(x.shape[0])), out)
        return self.kernel.gated_linear(x, self.weight, self._out.first(x.shape[0]), out, self.activation)

    def adapter_parts(self, path: str) -> list[AdapterPart]:
        """The projections that an adapter may change, in order."""
        reordered = self._checkpoint_rows(path)
        return [
            AdapterPart(module, rows, reordered.get(module))
            for module, rows in zip(self.modules(path), self.stored.values(), strict=True)
        ]

    def _adapter_rows(self, x: torch.Tensor) -> AdapterRows | None:
        """Which adapters the rows of the current step have; None: none."""
        return None if self.adapters is None else self._current.of(x.shape[0])

    def _adapted(self, x: torch.Tensor, rows: AdapterRows, out: torch.Tensor) -> torch.Tensor:
        """`into`, with each row's adapter added before the result is rounded."""
        assert self.adapters is not None
        if out.dtype == torch.float32:
            return add_adapters(x, self.kernel.linear(x, self.weight, out), self.adapters, rows, out)
        for start in range(0, x.shape[0], _ROWS_AT_ONCE):
            own = slice(start, start + _ROWS_AT_ONCE)
            base = self.kernel.linear(x[own], self.weight, self._base[: x[own].shape[0]])
            add_adapters(x[own], base, self.adapters, AdapterRows(rows.slots[own]), out[own])
        return out


def tensors_of_weight(weight: object) -> Iterator[torch.Tensor]:
    """What a weight holds in memory, also in its parts."""
    for value in vars(weight).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            for part in value:
                yield from tensors_of_weight(part)


class HeadsLinear(Linear):
    """Heads side by side. The checkpoint may have their dimensions in another order."""

    _order: torch.Tensor | None = None

    def reorder(self, order: Sequence[int], num_heads: int) -> None:
        """Of the first `num_heads` heads: which dimension of the checkpoint each is."""
        rows = torch.arange(self.out_features, dtype=torch.int64, device="cpu")
        turned = rows[: num_heads * len(order)].view(num_heads, len(order))[:, list(order)]
        self._order = torch.cat([turned.reshape(-1), rows[turned.numel() :]])

    def _checkpoint_rows(self, path: str) -> dict[str, torch.Tensor]:
        taken = super()._checkpoint_rows(path)
        if self._order is None:
            return taken
        all_rows, start = {}, 0
        for module, count in zip(self.modules(path), self.parts.values(), strict=True):
            rows = self._order[start : start + count] - start
            all_rows[module] = taken[module][rows] if module in taken else rows
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
        rows = self._rows.get(name.rpartition(".")[0])
        if rows is None:
            return tensor
        rows = rows.to(tensor.device)
        if tensor.dtype.itemsize > 1:
            return tensor.index_select(0, rows)
        # bytes: not every device takes rows of fp8
        return tensor.view(torch.uint8).index_select(0, rows).view(tensor.dtype)
