"""Matmul of activations with a weight of 4 or 8 bits, on a GPU: the weight stays packed in memory.

Contract: `packed_linear` gives the bits of `kernels.linear` for the matrix that `widen` makes of the weight, at every
number of rows. A number of the matrix is

    (code - zero) * scale, as exact product, rounded to the dtype of the scales, then to that of the matrix    integers
    e2m1(code) * 2 ** (scale - 127), which is exact in bfloat16                                              MXFP4

and is widened in registers by operations of that dtype, each of which IEEE 754 determines. Every output element is one
float32 accumulator over ascending K, in the tensor core's own steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.lazy_module import LazyModule
from sempre.kernels.packed.codes import CodeForm, Codes, Numbers, e2m1, unpaired

if TYPE_CHECKING:
    from sempre.kernels.packed import gpu as _gpu
    from sempre.kernels.packed import packing as _packing
else:
    _gpu = LazyModule(__name__, "gpu")
    _packing = LazyModule(__name__, "packing")

__all__ = [
    "CodeForm",
    "Codes",
    "Numbers",
    "PackedScheme",
    "PackedWeight",
    "can_pack",
    "can_unpack",
    "e2m1",
    "pack_codes",
    "packed_linear",
    "unpaired",
    "widen",
]

# out features of a block of words
BLOCK_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)
# arithmetic of two bfloat16 numbers at a time
LEAST_CAPABILITY = (9, 0)


class PackedScheme(Enum):
    """What a packed weight's numbers are."""

    INT4 = "packed int4"
    INT8 = "packed int8"
    MXFP4 = "packed mxfp4"

    @property
    def bits(self) -> int:
        """Of a number."""
        return 8 if self is PackedScheme.INT8 else 4

    @property
    def unit(self) -> int:
        """Inputs of a block of words: a thread's four words of 32 bits hold two rows of it."""
        return 256 // self.bits


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in blocks of 16 rows and `unit` inputs, whose words lie as the tensor cores take them.

    `words` int32 [N / 16, K * bits / 2]; `pairs` int32 [G, N]: the scale's 16 bits, and above them those of the zero as
    the unpacking subtracts it. `bias` [N] or None. `excluded` names tiles that the self-test found to disagree.
    """

    words: torch.Tensor
    pairs: torch.Tensor
    bias: torch.Tensor | None
    in_features: int
    scheme: PackedScheme
    scale_dtype: torch.dtype
    dtype: torch.dtype
    """of the matrix that it stands for, and of x"""
    excluded: frozenset[str] = frozenset()
    leaves: int = 1

    @property
    def out_features(self) -> int:
        return int(self.pairs.shape[1])

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // int(self.pairs.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in (self.words, self.pairs, self.bias) if part is not None)


def scheme_of(form: CodeForm) -> PackedScheme:
    """The scheme of numbers of this form."""
    if form.numbers is Numbers.E2M1:
        return PackedScheme.MXFP4
    return PackedScheme.INT4 if form.bits == 4 else PackedScheme.INT8


def can_pack(form: CodeForm, out_features: int, in_features: int, scale: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a matrix of this form and size; others are to be widened beforehand."""
    scheme, group = scheme_of(form), form.group_of(in_features)
    if scheme is PackedScheme.MXFP4:
        fits = dtype is torch.bfloat16 and group == 32
    else:
        whole = group == in_features or group & (group - 1) == 0
        fits = dtype in DTYPES and scale in DTYPES and whole and group >= 32
    return fits and out_features % BLOCK_ROWS == 0 and in_features % scheme.unit == 0 and in_features % group == 0


def can_unpack(device: torch.device) -> bool:
    """Whether a device has the instructions that widen numbers in registers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def pack_codes(matrices: Sequence[Codes], bias: torch.Tensor | None, dtype: torch.dtype) -> PackedWeight:
    """Matrices of one form and equal K, one after the other along their outputs, and `bias` [N]. ValueError where
    `can_pack` is False or exponents of MXFP4 exceed 128."""
    return _packing.pack_codes(matrices, bias, dtype)


def packed_linear(x: torch.Tensor, w: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """x [T, K] of the weight's dtype times the weight into out [T, N], of that dtype or float32; both contiguous, on
    the GPU. Returns `out`."""
    check_rows("packed_linear", x, out)
    if x.shape[1] != w.in_features or out.shape != (x.shape[0], w.out_features):
        raise ValueError(
            f"packed_linear: x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of"
            f" {w.out_features} x {w.in_features}"
        )
    if x.dtype is not w.dtype:
        raise TypeError(f"packed_linear: x is {x.dtype}, the weight stands for {w.dtype}; they must be the same")
    if not x.shape[0]:
        return out
    return _gpu.linear(x, w, out)


def widen(w: PackedWeight) -> torch.Tensor:
    """The matrix [N, K] that the weight stands for."""
    return _gpu.widen(w)
