"""A weight on a GPU: row-major as in the checkpoint, with the choice of kernels it may use. N out, K in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuLinear:
    """`weight` [N, K] and `bias` [N] or None, both in the model dtype, contiguous, on one device.

    `excluded` names kernel choices (`str` of an entry of the table) that the self-test found to disagree.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    excluded: frozenset[str] = frozenset()

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0))
