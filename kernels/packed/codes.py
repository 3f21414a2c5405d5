"""Matrices of few bits as checkpoints have them, whatever their layout: codes, and scales of groups of inputs.

# N out, K in, G groups of K
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

# of the codes 0 to 7; the fourth bit is the sign
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# the bits of float32's 2 ** -127, which has no exponent of its own
_SMALLEST = 1 << 22


class Numbers(Enum):
    """What codes stand for."""

    INTEGERS = "integers"
    E2M1 = "e2m1"
    """floats of 4 bits (OCP Microscaling Formats 1.0)"""


@dataclass(frozen=True)
class CodeForm:
    """Everything about codes besides their values; `group`: inputs that share a scale, None for all."""

    bits: int
    group: int | None
    has_zeros: bool = False
    numbers: Numbers = Numbers.INTEGERS

    def group_of(self, in_features: int) -> int:
        """Inputs that share a scale."""
        return in_features if self.group is None else self.group

    @property
    def middle(self) -> int:
        """The zero where none are stored."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Codes:
    """`codes` uint8 [N, K * bits / 8], an earlier input in the lower bits; `scales` [N, G], of e2m1 numbers uint8
    exponents with 127 added; `zeros` int16 [N, G] or None. `group_of` int64 [K]: each input's group, where they do not
    follow one another."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    form: CodeForm
    group_of: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1]) * 8 // self.form.bits

    def numbers(self) -> torch.Tensor:
        """uint8 [N, K]: the codes, each in a byte."""
        return self.codes if self.form.bits == 8 else unpaired(self.codes)

    def values(self) -> torch.Tensor:
        """What the matrix stands for [N, K], in the dtype of its scales; bfloat16 of e2m1 numbers."""
        if self.form.numbers is Numbers.E2M1:
            return self._spread(powers_of_two(self.scales)).mul_(e2m1(self.numbers())).to(torch.bfloat16)
        numbers = self.numbers().to(torch.int16)
        numbers -= self.form.middle if self.zeros is None else self._spread(self.zeros)
        # exact products, rounded once
        return numbers.float().mul_(self._spread(self.scales).float()).to(self.scales.dtype)

    def _spread(self, grouped: torch.Tensor) -> torch.Tensor:
        """[N, G] → [N, K]"""
        if self.group_of is not None:
            return grouped[:, self.group_of]
        return grouped.repeat_interleave(self.in_features // grouped.shape[1], 1)


def unpaired(pairs: torch.Tensor) -> torch.Tensor:
    """uint8 [..., B] → [..., 2 B]: two numbers of each byte, that in the lower bits first."""
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32, of uint8 codes from 0 to 15."""
    signed = [*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)]
    return torch.tensor(signed, dtype=torch.float32, device=codes.device)[codes.int()]


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (e - 127) in float32, of uint8 exponents below 255."""
    wide = exponents.to(torch.int32)
    return torch.where(wide > 0, wide << 23, _SMALLEST).view(torch.float32)
