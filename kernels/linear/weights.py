"""A weight on a GPU: row-major as in the checkpoint, with the choice of kernels it may use. N out, K in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.kernels.fp8 import Fp8Scheme


@dataclass(frozen=True)
class GpuLinear:
    """`weight` [N, K] and `bias` [N] or None, both in the model dtype, contiguous, on one device.

    An fp8 `weight` has a `scheme`, and `scale` [N] float32.
    `excluded` names kernel choices (`str` of an entry of the table) that the self-test found to disagree.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    excluded: frozenset[str] = frozenset()
    scale: torch.Tensor | None = None
    scheme: Fp8Scheme | None = None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in (self.weight, self.bias, self.scale) if part is not None)
