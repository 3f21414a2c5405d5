"""Weights in the layout of each device's kernels. N out, K in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sempre.kernels.fp8 import Fp8Scheme

Int64 = npt.NDArray[np.int64]


class _Weight:
    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in vars(self).values() if isinstance(part, torch.Tensor))


@dataclass(frozen=True)
class CpuLinearWeight(_Weight):
    """A weight in panels: `panels` [P, K, 32], columns past N zero; `bias` [N] float32 or None.

    An fp8 weight has a `scheme`, and `scale` [N] float32. `dtype_code` is that of `kernels.dtypes`. K is summed in
    `leaves` equal parts. With `rounds_x` the panels are those of pairs, int32 [P, ceil(K / 2), 32] (`cpu_pairs`).
    """

    panels: torch.Tensor
    bias: torch.Tensor | None
    in_features: int
    out_features: int
    dtype_code: int
    scale: torch.Tensor | None = None
    scheme: Fp8Scheme | None = None
    leaves: int = 1
    rounds_x: bool = False


@dataclass(frozen=True)
class WeightGroup:
    """Weights on a CPU of one shape, dtype and scheme, where they lie in memory."""

    weights: tuple[CpuLinearWeight, ...]
    panels: Int64
    """[G] addresses"""
    scales: Int64
    """[G] addresses of the scales of columns; 0: none"""
    biases: Int64
    """[G] addresses; 0: none"""

    @property
    def in_features(self) -> int:
        return self.weights[0].in_features

    @property
    def out_features(self) -> int:
        return self.weights[0].out_features


class GroupRows(NamedTuple):
    """Which rows a weight computes, weight by weight."""

    starts: Int64
    """[G + 1]: entries [starts[g], starts[g + 1]) are those of weight g"""
    x_rows: Int64
    """[P]: of each, the row of x"""
    out_rows: Int64
    """[P]: and that of the result"""


@dataclass(frozen=True)
class _RowMajorWeight(_Weight):
    """`weight` [N, K] and `bias` [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class GpuLinearWeight(_RowMajorWeight):
    """As in the checkpoint; both in the model dtype, contiguous, on one device.

    An fp8 `weight` has a `scheme`, and `scale` [N] float32.
    `excluded` names kernel choices (`str` of an entry of the table) that the self-test found to disagree. K is summed
    in `leaves` equal parts.
    """

    excluded: frozenset[str] = frozenset()
    scale: torch.Tensor | None = None
    scheme: Fp8Scheme | None = None
    leaves: int = 1


@dataclass(frozen=True)
class ControlLinearWeight(_RowMajorWeight):
    """For the library's matmul: float32 on CPU, unchanged on a GPU; an fp8 weight is widened to float32."""

    scheme: Fp8Scheme | None = None

    @property
    def leaves(self) -> int:
        """The library decides on the order of its sums."""
        return 1
