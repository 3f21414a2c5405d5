"""Matrices of 8-bit numbers with one scale per output channel or for all: int8 of compressed-tensors, and fp8 with
static scales of inputs. Only weights are quantised here; scales of inputs are not used.

Values are number * scale, rounded to bfloat16 where the scale has float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.kernels.packed import CodeForm, Codes
from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.widened import Shape
from sempre.workers.tensor_source import FLOAT_NAMES, FP8_NAME, Parameter

INT8, FP8 = "I8", FP8_NAME


@dataclass(frozen=True)
class Scaled:
    """`.weight` [N, K] of a dtype, `.weight_scale` [N, 1] or [1], and perhaps `.input_scale` [1]."""

    dtype: str
    by_channel: bool
    main = ".weight"
    scale = ".weight_scale"
    group_index = None

    @property
    def name(self) -> str:
        return "int8" if self.dtype == INT8 else "static fp8"

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[0], main[1]

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        return {
            self.main: Parameter((out_features, in_features), (self.dtype,)),
            self.scale: Parameter((out_features, 1) if self.by_channel else (1,), tuple(FLOAT_NAMES)),
        }

    def optional(self) -> dict[str, Parameter]:
        return {".input_scale": Parameter((1,))}

    def dtype_name(self, scale: str) -> str:
        return "F16" if scale == "F16" else "BF16"

    def form(self) -> CodeForm | None:
        return CodeForm(8, None) if self.dtype == INT8 else None

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> Codes:
        numbers, form = tensors[self.main], CodeForm(8, None)
        scales = tensors[self.scale].reshape(-1, 1).expand(len(numbers), 1).contiguous()
        return Codes((numbers.to(torch.int16) + form.middle).to(torch.uint8), scales, None, form)

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = tensors[self.scale]
        target = torch.float16 if scale.dtype is torch.float16 else torch.bfloat16
        return (tensors[self.main].float() * scale.float()).to(target)


def _scales_by_channel(group: ConfigFields, kind: str) -> bool:
    """Whether its weights, of 8 bits and the type `kind`, have a scale for each channel, not one for all."""
    weights = group.section("weights")
    weights.one_of("type", kind)
    weights.one_of("num_bits", 8)
    weights.one_of("symmetric", None, True)
    weights.one_of("strategy", "channel", "tensor")
    weights.one_of("dynamic", None, False)
    return bool(weights.raw["strategy"] == "channel")


def parse_int_quantized(group: ConfigFields) -> Scaled:
    """`group`: the only one of config_groups. Raises ModelError naming the field."""
    by_channel = _scales_by_channel(group, "int")
    if group.raw.get("input_activations") is not None:
        activations = group.section("input_activations")
        activations.one_of("type", "int")
        activations.one_of("num_bits", 8)
        activations.one_of("symmetric", None, True)
    return Scaled(INT8, by_channel)


def parse_static_fp8(group: ConfigFields) -> Scaled:
    """The same, for inputs with static scales."""
    by_channel = _scales_by_channel(group, "float")
    group.section("input_activations").one_of("strategy", "tensor")
    return Scaled(FP8, by_channel)


def parse_fp8_of_tensors(fields: ConfigFields) -> Scaled:
    """The section `quantization_config` of method fp8 without blocks. Raises ModelError naming the field."""
    fields.one_of("activation_scheme", "static", "dynamic")
    return Scaled(FP8, by_channel=False)
