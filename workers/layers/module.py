"""A model is a tree of modules. Code that walks it knows no family: loading, hashing, counting, self-test, dummies.

Attributes that are modules are children named after the attribute, so that paths are the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from sempre.kernels.attention import AttentionWorkspace
from sempre.kernels.rope import RopeSpec, cos_sin_table
from sempre.workers.layers.linear_kernel import LinearKernel
from sempre.workers.layers.lora import CurrentAdapters
from sempre.workers.parallel import ALONE, Parallel
from sempre.workers.quantization.method import Quantization
from sempre.workers.tensor_source import Parameter


class Tensors(Protocol):
    """The checkpoint's tensors, on the model's device."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored."""

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight or a bias, in their dtype."""

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A matrix that was read, in the dtype for matrices."""


@dataclass(frozen=True)
class Build:
    """How the modules of a model store and multiply matrices, and which parts of them are this rank's."""

    kernel: LinearKernel
    quantization: Quantization
    parallel: Parallel = ALONE


class RowBuffer:
    """Rows of activations, shared by the modules of one role and width."""

    def __init__(self, rows: torch.Tensor) -> None:
        """`rows` [max_tokens, width]"""
        self._rows = rows
        self._count = rows.shape[0]
        self._first = rows

    def first(self, count: int) -> torch.Tensor:
        """The first rows [count, width]; the view is kept, as all layers of a step ask for the same."""
        if count != self._count:
            self._count, self._first = count, self._rows[:count]
        return self._first


@dataclass(frozen=True)
class Scratch:
    """Memory for the steps of one runner, of at most `max_tokens` rows and contexts of at most `max_model_len`."""

    max_tokens: int
    max_model_len: int
    activations: torch.dtype
    device: torch.device
    workspace: AttentionWorkspace | None = None
    adapters: CurrentAdapters = field(default_factory=CurrentAdapters)
    _rows: dict[tuple[str, int], RowBuffer] = field(default_factory=dict)
    _tensors: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)
    _tables: dict[RopeSpec, torch.Tensor] = field(default_factory=dict)

    def rows(self, role: str, width: int) -> RowBuffer:
        """[max_tokens, width] of activations."""
        key = (role, width)
        if key not in self._rows:
            self._rows[key] = RowBuffer(self.tensor(role, (self.max_tokens, width), self.activations))
        return self._rows[key]

    def tensor(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Layers run one after the other and share buffers of the same role, shape and dtype."""
        key = (role, shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return self._tensors[key]

    def rope_table(self, rope: RopeSpec) -> torch.Tensor:
        """Cosines and sines of every position."""
        if rope not in self._tables:
            self._tables[rope] = cos_sin_table(rope, self.max_model_len).to(self.device)
        return self._tables[rope]


class Module:
    """A node of the tree. It is constructed (shapes only), then loads, allocates and computes."""

    elsewhere: frozenset[str] = frozenset()
    """children that workers of other stages have"""

    def children(self) -> Iterator[tuple[str, Module]]:
        """Attributes that are modules, or lists of modules, in the order in which they were set, but for those
        elsewhere."""
        for name, value in vars(self).items():
            if name.startswith("_") or name in self.elsewhere:
                continue
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                items = ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Module))
                yield from (item for item in items if item[0] not in self.elsewhere)

    def walk(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """All modules below this one, then itself, with their paths."""
        for name, child in self.children():
            yield from child.walk(f"{path}.{name}" if path else name)
        yield path, self

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        """The tensors this module itself reads, by name in the checkpoint."""
        return iter(())

    def load(self, path: str, tensors: Tensors) -> None:
        """Load the tensors that `own_parameters` names."""

    def own_tensors(self) -> Iterator[torch.Tensor]:
        """The loaded tensors, as they are in memory."""
        return iter(())

    def allocate(self, scratch: Scratch) -> None:
        """Allocate what this module itself needs for computing steps."""

    def shape(self) -> tuple[object, ...]:
        """Everything besides parameters that decides which kernels run; modules of equal shapes compute alike."""
        return ()


def parameters(model: Module) -> dict[str, Parameter]:
    """Every tensor that the model reads, by name."""
    return {name: parameter for path, module in model.walk() for name, parameter in module.own_parameters(path)}


def allocate(model: Module, scratch: Scratch) -> None:
    """Prepare for computing steps; may be repeated with another scratch."""
    for _, module in model.walk():
        module.allocate(scratch)


M = TypeVar("M", bound=Module)


def sharing(module: M) -> M:
    """A separate tree with the same tensors; what it allocates is its own."""
    twin = copy(module)
    for name, value in vars(twin).items():
        if isinstance(value, Module):
            setattr(twin, name, sharing(value))
        elif isinstance(value, list):
            setattr(twin, name, [sharing(item) if isinstance(item, Module) else item for item in value])
    return twin
