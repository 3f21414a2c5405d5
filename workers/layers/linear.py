"""A linear layer: projections of the checkpoint that are fused into one, in any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

import torch

from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear_kernel import LinearWeight
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.tensor_source import Parameter


class Use(Enum):
    """Which of the kernels for its shape compute it."""

    PLAIN = "plain"
    GATED = "gated"
    """with the activation of a gated feed-forward branch"""
    LOGITS = "logits"
    """results are float32, in a buffer of the caller's"""


class Linear(Module):
    """x [T, K] → [T, N]. `parts`: names of the checkpoint's projections, which are siblings, with the N of each."""

    weight: LinearWeight

    def __init__(
        self,
        build: Build,
        parts: Mapping[str, int],
        in_features: int,
        *,
        bias: bool = False,
        use: Use = Use.PLAIN,
        role: str = "branch",
    ) -> None:
        """`role` names the buffer of the results, which all of that role and N share."""
        self.parts = dict(parts)
        self.in_features = in_features
        self.out_features = sum(parts.values())
        self.bias = bias
        self.use = use
        self.kernel = build.kernel
        self._role = role
        self._quantization = build.quantization

    def modules(self, path: str) -> list[str]:
        """The projections' names in the checkpoint."""
        parent = path.rpartition(".")[0]
        return [f"{parent}.{part}" if parent else part for part in self.parts]

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        modules = self.modules(path)
        method = self._quantization.method(modules)
        for module, rows in zip(modules, self.parts.values(), strict=True):
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
            for module, rows in zip(modules, self.parts.values(), strict=True)
        }
        self.weight = method.pack(parts, bias, self.kernel, tensors.matrix)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        for value in vars(self.weight).values():
            if isinstance(value, torch.Tensor):
                yield value

    def allocate(self, scratch: Scratch) -> None:
        if self.use is not Use.LOGITS:
            self._out = scratch.rows(self._role, self.out_features)

    def shape(self) -> tuple[object, ...]:
        return (self.out_features, self.in_features, self.bias, self.weight.scheme)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, N], in the buffer of this role."""
        return self.into(x, self._out[: x.shape[0]])

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write to, and return, `out` [T, N]."""
        return self.kernel.linear(x, self.weight, out)

    def gated(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half of the result, into `out` [T, N / 2]."""
        self.kernel.linear_silu_and_mul(x, self.weight, self._out[: x.shape[0]], out)
        return out


class TiedLinear(Linear):
    """Logits by the embedding's table, which has been loaded before; reads no tensor of its own."""

    def __init__(self, build: Build, embedding: Embedding) -> None:
        super().__init__(build, {"lm_head": embedding.num_rows}, embedding.width, use=Use.LOGITS)
        self._embedding = embedding

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        return iter(())

    def load(self, path: str, tensors: Tensors) -> None:
        self.weight = self.kernel.pack(self._embedding.weight, None)
