"""What a matrix format implements: which tensors store a matrix, and how they are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.tensor_source import Parameter


class QuantizationMethod(Protocol):
    """One format."""

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        """The tensors of the matrix `module`, by suffix of its name."""

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        """The kernel's form of some matrices, given by name and suffix, fused along their outputs.

        `as_matrix` converts to the dtype for matrices. Raises TensorMismatch for values that the format does not allow.
        """


class Quantization(Protocol):
    """The formats of one model's matrices."""

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        """The format of matrices that are fused. Raises TensorMismatch where they do not have the same."""
