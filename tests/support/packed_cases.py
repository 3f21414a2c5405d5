"""Random codes of every form that packed weights have."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sempre.kernels.packed import CodeForm, Codes, Numbers


class PackedCase(NamedTuple):
    """Sizes and form; `scale`: the dtype of scales."""

    rows: int
    width: int
    form: CodeForm
    scale: torch.dtype = torch.float16

    @property
    def is_float(self) -> bool:
        return self.form.numbers is Numbers.E2M1

    def __str__(self) -> str:
        form = self.form
        zeros = "-zeros" if form.has_zeros else ""
        return f"{form.numbers.value}{form.bits}-g{form.group}{zeros}-{self.rows}x{self.width}"


CASES = (
    PackedCase(48, 192, CodeForm(4, 32, has_zeros=True)),
    PackedCase(64, 256, CodeForm(4, 128, has_zeros=True)),
    PackedCase(80, 192, CodeForm(4, 64)),
    PackedCase(32, 192, CodeForm(4, None)),
    PackedCase(32, 96, CodeForm(8, 32, has_zeros=True)),
    PackedCase(80, 192, CodeForm(8, None)),
    PackedCase(64, 128, CodeForm(4, 32, numbers=Numbers.E2M1)),
)


def make_codes(case: PackedCase, seed: int = 0) -> Codes:
    """Every code and zero may occur."""
    generator = torch.Generator().manual_seed(seed)
    form, groups = case.form, case.width // case.form.group_of(case.width)
    codes = torch.randint(0, 256, (case.rows, case.width * form.bits // 8), generator=generator).to(torch.uint8)
    shape = (case.rows, groups)
    if case.is_float:
        # values that the interpreter's bfloat16 holds as well
        return Codes(codes, torch.randint(100, 129, shape, generator=generator).to(torch.uint8), None, form)
    scales = (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(case.scale)
    # stored zeros may have one added
    zeros = torch.randint(0, (1 << form.bits) + 1, shape, generator=generator).to(torch.int16)
    return Codes(codes, scales, zeros if form.has_zeros else None, form)
