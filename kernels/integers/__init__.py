"""Matmul of integers on a CPU: weights of 4 or 8 bits in groups along K, activations quantised to int8 in blocks.

# T rows of x, K inputs, N outputs, G groups of K of 16 or 32 inputs, B = K / 32 blocks of a row
Contract. A weight is code * scale - minimum, with int8 codes and, for each group of an output, a float32 scale and
minimum (or none). In each block of 32 of a row of x:

    d = amax / 127                            0 for a block of zeros; NaN where a value is not finite
    q = x / d, rounded to an integer, ties to even, at most 127 in magnitude; 0 where d is 0
    out[t, n] = sum over groups ascending, starting at 0, of two fused multiply-adds:
                sum += dot * (d * scale), then sum += total * -(d * minimum); the bias is added last

`dot` is the sum of code * q over a group and `total` that of q: integers below 2**24, exact in any order, as are their
conversions to float32. Every other operation is one of IEEE 754's on float32, written out: a division, a product, a
fused multiply-add. So the bits depend neither on rows or threads nor on which instructions a CPU has for the integers:
VNNI, AVX2 or plain ones.

A weight may have K in L equal leaves of whole blocks, L a power of two up to 8. Each is a sum as above; they are added
as a balanced binary tree, ((0+1)+(2+3))+((4+5)+(6+7)), and the bias last. So workers that own whole subtrees each pass
one partial sum, as in `kernels.linear`. Blocks of x are the same for any L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.integers import cpu as _cpu
else:
    _cpu = LazyModule(__name__, "cpu")

__all__ = [
    "BLOCK",
    "GroupedIntegers",
    "IntegerPart",
    "IntegerScheme",
    "IntegerWeight",
    "Layout",
    "integer_linear",
    "pack_integer_linear",
    "pack_integers",
    "partial_integer_linear",
    "sum_integer_partials",
]

BLOCK = 32
GROUPS = (16, 32)
PANEL = 32


class IntegerScheme(Enum):
    """Where the integers come from; the values are those of the engine's setting `quantization`."""

    INT8 = "int8"
    """floats, quantised to 8 bits while loading"""
    INT4 = "int4"
    """floats, quantised to 4 bits while loading"""
    STORED = "integer"
    """the checkpoint's own blocks"""


@dataclass(frozen=True)
class GroupedIntegers:
    """A matrix: `codes` int8 [N, K], `scale` and `minimum` (or None) float32 [N, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None

    @property
    def group(self) -> int:
        return int(self.codes.shape[1] // self.scale.shape[1])

    def inputs(self, own: range) -> GroupedIntegers:
        """Some of its inputs, whole groups."""
        columns, groups = slice(own.start, own.stop), slice(own.start // self.group, own.stop // self.group)
        minimum = None if self.minimum is None else self.minimum[:, groups]
        return GroupedIntegers(self.codes[:, columns], self.scale[:, groups], minimum)

    def values(self) -> torch.Tensor:
        """What the matrix stands for, float32 [N, K]."""
        rows, width = self.codes.shape
        wide = self.codes.reshape(rows, -1, self.group).float() * self.scale[..., None]
        if self.minimum is not None:
            wide -= self.minimum[..., None]
        return wide.view(rows, width)


@dataclass(frozen=True)
class Layout:
    """How the codes of a part lie in memory: each plus `offset`, in `bits`."""

    bits: int
    offset: int
    group: int
    has_minimum: bool


@dataclass(frozen=True)
class IntegerPart:
    """Some outputs of a weight, in panels of 32 of them; columns past N are zero.

    `codes` uint8: with 8 bits [P, K / 4, 32, 4]; with 4 bits [P, K / 8, 32, 4], two in a byte, the inputs 8i + j in the
    lower and 8i + 4 + j in the upper half. `scale`, `minimum` [P, G, 32].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    layout: Layout
    out_features: int


@dataclass(frozen=True)
class IntegerWeight:
    """A weight whose outputs are those of its parts, one after the other, and `bias` [N] float32 or None."""

    parts: tuple[IntegerPart, ...]
    """those of the first leaf, then of the next"""
    bias: torch.Tensor | None
    in_features: int
    scheme: IntegerScheme
    leaves: int = 1

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts) // self.leaves

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        each = (t for part in self.parts for t in (part.codes, part.scale, part.minimum))
        return tuple(t for t in (*each, self.bias) if t is not None)

    @property
    def nbytes(self) -> int:
        return sum(int(t.nbytes) for t in self.tensors)


def pack_integers(matrix: GroupedIntegers) -> IntegerPart:
    """Repack a matrix. Raises ValueError for a group other than 16 or 32, or a K that is no multiple of 32."""
    rows, width = matrix.codes.shape
    if matrix.group not in GROUPS or width % BLOCK:
        raise ValueError(f"integers: expected groups of {GROUPS} in blocks of {BLOCK}, found {matrix.group} of {width}")
    least, most = (int(bound) for bound in matrix.codes.aminmax())
    # 4 bits hold any sixteen codes that follow one another
    offset = 8 if least < 0 else 0
    bits = 4 if least >= -offset and most < 16 - offset else 8
    offset = offset if bits == 4 else 128
    codes = _panels((matrix.codes.to(torch.int16) + offset).to(torch.uint8), offset)
    quads = codes.view(codes.shape[0], PANEL, width // 4, 4).transpose(1, 2)
    if bits == 4:
        quads = quads[:, ::2] | (quads[:, 1::2] << 4)
    minimum = None if matrix.minimum is None else _grouped(matrix.minimum)
    layout = Layout(bits, offset, matrix.group, minimum is not None)
    return IntegerPart(quads.contiguous(), _grouped(matrix.scale), minimum, layout, rows)


def pack_integer_linear(
    matrices: Sequence[GroupedIntegers], bias: torch.Tensor | None, scheme: IntegerScheme, leaves: int = 1
) -> IntegerWeight:
    """Pack matrices of equal K, one after the other along their outputs, and `bias` [N]. ValueError for leaves that do
    not fit."""
    depth = int(matrices[0].codes.shape[1])
    if leaves not in (1, 2, 4, 8) or depth % (BLOCK * leaves):
        raise ValueError(
            f"integers: expected 1, 2, 4 or 8 leaves of a multiple of {BLOCK}, found {leaves} of K = {depth}"
        )
    own_bias = None if bias is None else bias.float().contiguous()
    each = depth // leaves
    ranges = [range(start, start + each) for start in range(0, depth, each)]
    parts = tuple(pack_integers(matrix.inputs(own)) for own in ranges for matrix in matrices)
    return IntegerWeight(parts, own_bias, depth, scheme, leaves)


def _panels(matrix: torch.Tensor, padding: int) -> torch.Tensor:
    """[N, width] → [P, 32, width]"""
    rows, width = matrix.shape
    count = -(-rows // PANEL)
    padded = torch.full((count * PANEL, width), padding, dtype=matrix.dtype, device=matrix.device)
    padded[:rows] = matrix
    return padded.view(count, PANEL, width)


def _grouped(values: torch.Tensor) -> torch.Tensor:
    return _panels(values.float(), 0).transpose(1, 2).contiguous()


def integer_linear(x: torch.Tensor, w: IntegerWeight, out: torch.Tensor) -> torch.Tensor:
    """x float32 [T, K] times the weight into out float32 [T, N]; both contiguous, on the CPU. Returns `out`."""
    return _integer_linear("integer_linear", x, w, w.bias, out)


def partial_integer_linear(x: torch.Tensor, w: IntegerWeight, out: torch.Tensor) -> torch.Tensor:
    """The same without the bias: a worker's share of a sum over several."""
    return _integer_linear("partial_integer_linear", x, w, None, out)


def _integer_linear(
    operation: str, x: torch.Tensor, w: IntegerWeight, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    check_rows(operation, x, out)
    if x.shape[1] != w.in_features or out.shape != (x.shape[0], w.out_features):
        raise ValueError(
            f"{operation}: x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of"
            f" {w.out_features} x {w.in_features}"
        )
    if not x.shape[0]:
        return out
    return _cpu.integer_linear(x, w, bias, out)


def sum_integer_partials(partials: torch.Tensor, w: IntegerWeight, out: torch.Tensor) -> torch.Tensor:
    """Add the workers' `partials` float32 [R, T, N] as a balanced binary tree, R a power of two, plus the bias, into
    out [T, N]. All contiguous; returns `out`."""
    ranks = partials.shape[0]
    if ranks & (ranks - 1) or partials.shape[1:] != out.shape or out.shape[1] != w.out_features:
        raise ValueError(
            f"sum_integer_partials: partials {tuple(partials.shape)} and out {tuple(out.shape)} do not fit a weight of"
            f" {w.out_features} x {w.in_features} and a power of two of workers"
        )
    if not out.shape[0]:
        return out
    from sempre.kernels.linear import cpu

    return cpu.add_partials(partials, None, w.bias, out)
