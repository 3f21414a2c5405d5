"""Matrices of floats, as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch

from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.tensor_source import Parameter, mismatch

PLAIN_SUFFIX = ".weight"


class Plain:
    """`.weight` [N, K]."""

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        return {PLAIN_SUFFIX: Parameter((out_features, in_features))}

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        weights = [as_matrix(part[PLAIN_SUFFIX]) for part in parts.values()]
        common = reduce(torch.promote_types, (weight.dtype for weight in weights))
        weight = torch.cat([weight.to(common) for weight in weights]) if len(weights) > 1 else weights[0]
        return kernel.pack(weight, bias)


PLAIN = Plain()


def finite_weight(module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The floats [N, K] of a matrix that is quantised while loading. Raises TensorMismatch unless all are finite."""
    weight = tensors[PLAIN_SUFFIX]
    if not bool(weight.isfinite().all()):
        raise mismatch(module + PLAIN_SUFFIX, "finite values", f"{int((~weight.isfinite()).sum())} that are not")
    return weight


class NotQuantized:
    """Every matrix is plain."""

    def method(self, modules: Sequence[str]) -> Plain:
        return PLAIN
