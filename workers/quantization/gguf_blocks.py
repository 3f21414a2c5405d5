"""The block formats of GGUF: an element is code * scale - minimum, by the codes and scales of its block.

# B blocks, N elements of a block, G groups of a block, each of N / G elements with a scale of its own
`scale` and `minimum` are float32. code * scale has at most 24 significant bits in every format, so that the product is
exact and the element has the bits of a fused multiply-add: those of the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sempre.ipc.gguf_index import BLOCK_SIZES, Form, GgufIndex

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""the values of the codes of IQ4_NL and IQ4_XS"""
FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""the values of the codes of MXFP4, twice as large as e2m1's, so that they are integers"""
CODES, SCALES, MINIMA = ".codes", ".code_scales", ".code_minima"
"""suffixes of a matrix's blocks as integers"""

# what each module is in GGUF has one source, whose rows are put in order while quantised
_FORMS_OF_INTEGERS = (Form.PLAIN, Form.HEADS, Form.EXPERT)
_GROUPS_OF_16 = ("Q2_K", "Q3_K", "Q6_K")
_WITH_MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
ROWS_AT_ONCE = 1 << 22
"""elements that are dequantised at once"""


class IntegerForm(NamedTuple):
    """What the groups of a type are."""

    group: int
    """elements that share a scale"""
    has_minimum: bool


def integer_form(kind: str) -> IntegerForm:
    """That of a block format."""
    return IntegerForm(16 if kind in _GROUPS_OF_16 else 32, kind in _WITH_MINIMA)


class Blocks(NamedTuple):
    """Unpacked blocks: `codes` int8 [B, N], `scale` and `minimum` (or None) float32 [B, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None

    def of_rows(self, rows: int) -> Blocks:
        """The same, where blocks of a row follow one another: [rows, K] and [rows, groups of K]."""
        minimum = None if self.minimum is None else self.minimum.view(rows, -1)
        return Blocks(self.codes.view(rows, -1), self.scale.view(rows, -1), minimum)

    def values(self) -> torch.Tensor:
        """float32 [B, N]"""
        groups = self.scale.shape[1]
        wide = self.codes.view(self.codes.shape[0], groups, -1).float() * self.scale[..., None]
        if self.minimum is not None:
            wide -= self.minimum[..., None]
        return wide.flatten(1)


def dequantize(kind: str, raw: torch.Tensor) -> torch.Tensor:
    """raw uint8 [rows, bytes of a row] of a block format → float32 [rows, K]."""
    block = BLOCK_SIZES[kind]
    per_row = raw.shape[1] // block.num_bytes
    width = per_row * block.elements
    out = torch.empty((raw.shape[0], width), dtype=torch.float32, device=raw.device)
    step = max(1, ROWS_AT_ONCE // width)
    for start in range(0, raw.shape[0], step):
        part = raw[start : start + step].reshape(-1, block.num_bytes)
        out[start : start + step] = UNPACK[kind](part).values().view(-1, width)
    return out


def _half(raw: torch.Tensor, at: int) -> torch.Tensor:
    """A float16 of each block, as float32 [B, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [B, …, n] → [B, …, 2, n]: the lower halves of the bytes, then the upper."""
    return torch.stack([raw & 15, raw >> 4], dim=-2)


def _shifted(raw: torch.Tensor, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """uint8 [B, …, n] → [B, …, shifts, n]"""
    return torch.stack([(raw >> shift) & mask for shift in shifts], dim=-2)


def _codes(values: torch.Tensor, offset: int = 0) -> torch.Tensor:
    codes = values.flatten(1).view(torch.int8)
    return codes - offset if offset else codes


def _looked_up(values: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.int8, device=values.device)[values.flatten(1).int()]


def _q4_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_codes(_nibbles(raw[:, 2:]), 8), _half(raw, 0))


def _q4_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_codes(_nibbles(raw[:, 4:])), _half(raw, 0), -_half(raw, 2))


def _fifth_bits(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 4], a bit for each element → 0 or 16 [B, 2, 16]"""
    bits = torch.stack([(raw >> bit) & 1 for bit in range(8)], dim=-1)
    return (bits << 4).view(-1, 2, 16)


def _q5_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_codes(_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]), 16), _half(raw, 0))


def _q5_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_codes(_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])), _half(raw, 0), -_half(raw, 2))


def _q8_0(raw: torch.Tensor) -> Blocks:
    return Blocks(raw[:, 2:].contiguous().view(torch.int8), _half(raw, 0))


def _q2_k(raw: torch.Tensor) -> Blocks:
    scales, stored = raw[:, :16], raw[:, 16:80].reshape(-1, 2, 32)
    minimum = _half(raw, 82) * (scales >> 4).float()
    return Blocks(_codes(_shifted(stored, (0, 2, 4, 6), 3)), _half(raw, 80) * (scales & 15).float(), minimum)


def _q3_k(raw: torch.Tensor) -> Blocks:
    low = _shifted(raw[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    # a bit that is not set takes 4 off
    high = _shifted(raw[:, :32], tuple(range(8)), 1).flatten(1)
    codes = low.view(torch.int8) - ((1 - high) << 2).view(torch.int8)
    scales = _nibbles(raw[:, 96:104]).flatten(1) | (_shifted(raw[:, 104:108], (0, 2, 4, 6), 3).flatten(1) << 4)
    return Blocks(codes, _half(raw, 108) * (scales.view(torch.int8) - 32).float())


def _six_bit_scales(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [B, 12] → the scales and minima of 8 groups, uint8 [B, 8] each."""
    first, second, third = raw.view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales, minima


def _q4_k(raw: torch.Tensor) -> Blocks:
    scales, minima = _six_bit_scales(raw[:, 4:16].contiguous())
    codes = _codes(_nibbles(raw[:, 16:].reshape(-1, 4, 32)))
    return Blocks(codes, _half(raw, 0) * scales.float(), _half(raw, 2) * minima.float())


def _q5_k(raw: torch.Tensor) -> Blocks:
    scales, minima = _six_bit_scales(raw[:, 4:16].contiguous())
    high = _shifted(raw[:, 16:48], tuple(range(8)), 1).view(-1, 4, 2, 32)
    codes = _codes(_nibbles(raw[:, 48:].reshape(-1, 4, 32)) | (high << 4))
    return Blocks(codes, _half(raw, 0) * scales.float(), _half(raw, 2) * minima.float())


def _q6_k(raw: torch.Tensor) -> Blocks:
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).flatten(1)
    high = _shifted(raw[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return Blocks(_codes(low | (high << 4), 32), _half(raw, 208) * scales)


def _iq4_nl(raw: torch.Tensor) -> Blocks:
    return Blocks(_looked_up(_nibbles(raw[:, 2:]), NONLINEAR), _half(raw, 0))


def _iq4_xs(raw: torch.Tensor) -> Blocks:
    low = torch.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], dim=-1).flatten(1)
    high = torch.stack([(raw[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    scales = (low | (high << 4)).view(torch.int8) - 32
    return Blocks(_looked_up(_nibbles(raw[:, 8:].reshape(-1, 8, 16)), NONLINEAR), _half(raw, 0) * scales.float())


def _mxfp4(raw: torch.Tensor) -> Blocks:
    exponents = raw[:, :1].to(torch.int32)
    # half of 2 ** (byte - 127); the two smallest are subnormal
    bits = torch.where(exponents < 2, 0x0020_0000 << exponents.clamp(max=1), (exponents - 1) << 23)
    return Blocks(_looked_up(_nibbles(raw[:, 1:]), FP4_DOUBLED), bits.view(torch.float32))


UNPACK: dict[str, Callable[[torch.Tensor], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
"""By type: uint8 [B, bytes of a block] → the unpacked blocks."""


def integer_forms(index: GgufIndex) -> dict[str, IntegerForm]:
    """The forms of the matrices that are stored in blocks, by module."""
    found = {}
    for name, entry in index.tensors.items():
        kind = entry.sources[0].type
        rank = len(entry.sources[0].shape) - (entry.form is Form.EXPERT)
        if name.endswith(".weight") and entry.form in _FORMS_OF_INTEGERS and kind in UNPACK and rank == 2:
            found[name.removesuffix(".weight")] = integer_form(kind)
    return found
