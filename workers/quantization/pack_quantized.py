"""compressed-tensors' `pack-quantized`: integers of 4 or 8 bits in words, a scale per group of K or output channel.

Numbers are stored with half of their range added, inputs that follow one another in one word, the first in the lowest
bits. Zeros are packed alike, but outputs that follow one another share a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.kernels.packed import CodeForm, Codes
from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.awq import INTEGERS
from sempre.workers.quantization.widened import Shape, group_numbers, groups_of, unpacked
from sempre.workers.tensor_source import FLOAT_NAMES, Parameter


@dataclass(frozen=True)
class PackQuantized:
    """`.weight_packed` [N, K * bits / 32], `.weight_scale` [N, G], `.weight_shape` [2]; not symmetric:
    `.weight_zero_point` [N * bits / 32, G]; by activation order: `.weight_g_idx` [K]."""

    bits: int
    group_size: int | None
    symmetric: bool
    by_activation_order: bool
    name = "pack-quantized"
    main = ".weight_packed"
    scale = ".weight_scale"

    @property
    def _per_word(self) -> int:
        return 32 // self.bits

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[0], main[1] * self._per_word

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        groups, _ = groups_of(in_features, self.group_size)
        found = {
            ".weight_packed": Parameter((out_features, in_features // self._per_word), INTEGERS),
            ".weight_scale": Parameter((out_features, groups), tuple(FLOAT_NAMES)),
            ".weight_shape": Parameter((2,), ("I64", "I32")),
        }
        if not self.symmetric:
            words = -(-out_features // self._per_word)
            found[".weight_zero_point"] = Parameter((words, groups), INTEGERS)
        if self.by_activation_order:
            found[".weight_g_idx"] = Parameter((in_features,), INTEGERS)
        return found

    def optional(self) -> dict[str, Parameter]:
        return {}

    def dtype_name(self, scale: str) -> str:
        return scale

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.codes(tensors).values()

    @property
    def group_index(self) -> str | None:
        return ".weight_g_idx" if self.by_activation_order else None

    def form(self) -> CodeForm:
        return CodeForm(self.bits, self.group_size, has_zeros=not self.symmetric)

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> Codes:
        words, scales, zeros = tensors[".weight_packed"], tensors[".weight_scale"], None
        shape = [words.shape[0], words.shape[1] * self._per_word]
        if tensors[".weight_shape"].tolist() != shape:
            raise ValueError(f".weight_shape {tensors['.weight_shape'].tolist()} of a matrix {shape}")
        if not self.symmetric:
            numbers = unpacked(tensors[".weight_zero_point"].t(), self.bits).t()[: shape[0]]
            zeros = numbers.to(torch.int16, memory_format=torch.contiguous_format)
        order = group_numbers(tensors, ".weight_g_idx", scales.shape[1]) if self.by_activation_order else None
        return Codes(words.contiguous().view(torch.uint8), scales, zeros, self.form(), order)


def parse_pack_quantized(group: ConfigFields) -> PackQuantized:
    """`group`: the only one of config_groups. Raises ModelError naming the field."""
    group.one_of("input_activations", None)
    weights = group.section("weights")
    weights.one_of("type", "int")
    weights.one_of("num_bits", 4, 8)
    weights.one_of("strategy", "group", "channel")
    weights.one_of("dynamic", None, False)
    weights.one_of("actorder", None, False, True, "group", "weight", "static")
    by_group = weights.raw["strategy"] == "group"
    return PackQuantized(
        weights.positive("num_bits"),
        weights.positive("group_size") if by_group else None,
        weights.boolean("symmetric", default=True),
        weights.raw.get("actorder") in (True, "group"),
    )
