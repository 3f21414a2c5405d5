"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): numbers of 4 or 8 bits with a scale and a zero per group of inputs.

An input's group is stored (`g_idx`), so that inputs may have been put in groups by activation order. Inputs that follow
one another lie in one word, the first in the lowest bits. The first version of the layout stores zeros less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.kernels.packed import CodeForm, Codes
from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.awq import HALVES, INTEGERS, parse_group_size
from sempre.workers.quantization.widened import Shape, group_numbers, groups_of, unpacked
from sempre.workers.tensor_source import Parameter


@dataclass(frozen=True)
class Gptq:
    """`.qweight` [K * bits / 32, N], `.qzeros` [G, N * bits / 32], `.scales` [G, N], `.g_idx` [K]."""

    bits: int
    group_size: int | None
    zeros_less_one: bool
    name = "gptq"
    group_index = ".g_idx"
    main = ".qweight"
    scale = ".scales"

    @property
    def _per_word(self) -> int:
        return 32 // self.bits

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[1], main[0] * self._per_word

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        groups, _ = groups_of(in_features, self.group_size)
        if out_features % self._per_word:
            raise ValueError(f"its {out_features} outputs are not a multiple of {self._per_word}")
        return {
            ".qweight": Parameter((in_features // self._per_word, out_features), INTEGERS),
            ".qzeros": Parameter((groups, out_features // self._per_word), INTEGERS),
            ".scales": Parameter((groups, out_features), HALVES),
            ".g_idx": Parameter((in_features,), INTEGERS),
        }

    def optional(self) -> dict[str, Parameter]:
        return {}

    def dtype_name(self, scale: str) -> str:
        return scale

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.codes(tensors).values()

    def form(self) -> CodeForm:
        return CodeForm(self.bits, self.group_size, has_zeros=True)

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> Codes:
        scales = tensors[".scales"].t().contiguous()
        words = tensors[".qweight"].t().contiguous()
        zeros = unpacked(tensors[".qzeros"], self.bits).to(torch.int16) + int(self.zeros_less_one)
        order = group_numbers(tensors, ".g_idx", scales.shape[1])
        return Codes(words.view(torch.uint8), scales, zeros.t().contiguous(), self.form(), order)


def parse_gptq(fields: ConfigFields) -> Gptq:
    """Raises ModelError naming the field."""
    fields.one_of("bits", 4, 8)
    # rules that give some modules other numbers of bits
    fields.one_of("dynamic", None, {})
    fields.one_of("pack_dtype", None, "int32")
    name = "checkpoint_format" if fields.raw.get("checkpoint_format") is not None else "format"
    fields.one_of(name, None, "gptq", "gptq_v2")
    return Gptq(fields.positive("bits"), parse_group_size(fields, "group_size"), fields.raw.get(name) != "gptq_v2")
