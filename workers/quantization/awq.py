"""AWQ (Lin et al. 2023, arXiv 2306.00978), in the layout `gemm`: 4-bit numbers with a scale and a zero per group of K.

The columns of eight outputs lie in one word, in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.kernels.packed import CodeForm, Codes
from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.widened import Shape, groups_of, paired, unpacked
from sempre.workers.tensor_source import Parameter

# of each of the eight outputs
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
PER_WORD = 8
INTEGERS = ("I32",)
HALVES = ("F16", "BF16")


@dataclass(frozen=True)
class Awq:
    """`.qweight` [K, N / 8], `.qzeros` [G, N / 8], `.scales` [G, N]."""

    group_size: int | None
    name = "awq"
    group_index = None
    main = ".qweight"
    scale = ".scales"

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[1] * PER_WORD, main[0]

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        groups, _ = groups_of(in_features, self.group_size)
        words = out_features // PER_WORD
        return {
            ".qweight": Parameter((in_features, words), INTEGERS),
            ".qzeros": Parameter((groups, words), INTEGERS),
            ".scales": Parameter((groups, out_features), HALVES),
        }

    def optional(self) -> dict[str, Parameter]:
        return {}

    def dtype_name(self, scale: str) -> str:
        return scale

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.codes(tensors).values()

    def form(self) -> CodeForm:
        return CodeForm(4, self.group_size, has_zeros=True)

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> Codes:
        numbers, zeros = (unpacked(tensors[suffix], 4, PLACES).t() for suffix in (".qweight", ".qzeros"))
        scales = tensors[".scales"].t().contiguous()
        return Codes(paired(numbers), scales, zeros.to(torch.int16, memory_format=torch.contiguous_format), self.form())


def parse_awq(fields: ConfigFields) -> Awq:
    """Raises ModelError naming the field."""
    fields.one_of("bits", 4)
    fields.one_of("version", None, "gemm", "GEMM")
    fields.one_of("zero_point", True)
    return Awq(parse_group_size(fields, "group_size"))


def parse_group_size(fields: ConfigFields, name: str) -> int | None:
    """None for -1, one group. Raises ModelError."""
    return None if fields.raw.get(name) == -1 else fields.positive(name)
