"""NVFP4: blocks of 16 4-bit numbers (e2m1) with an fp8 scale, and a float32 scale of the whole matrix; weights only.

Two exporters write it: NVIDIA's ModelOpt stores the matrix's scale, compressed-tensors its reciprocal. Scales of
activations, of engines that quantise those too, are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.kernels.packed import e2m1, unpaired
from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.widened import Shape, groups_of
from sempre.workers.tensor_source import FP8_NAME, Parameter

BLOCK = 16


@dataclass(frozen=True)
class Nvfp4:
    """The names of the numbers [N, K / 2] (two in a byte, the first in the lower bits), of the blocks' scales
    [N, K / 16], and of the matrix's."""

    main: str
    matrix_scale: str
    is_reciprocal: bool
    unused: tuple[str, ...]
    name = "nvfp4"
    scale = ".weight_scale"

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[0], 2 * main[1]

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        groups, _ = groups_of(in_features, BLOCK)
        return {
            self.main: Parameter((out_features, in_features // 2), ("U8",)),
            self.scale: Parameter((out_features, groups), (FP8_NAME,)),
            self.matrix_scale: Parameter((1,), ("F32",)),
        }

    def optional(self) -> dict[str, Parameter]:
        return {suffix: Parameter((1,), ("F32",)) for suffix in self.unused}

    def dtype_name(self, scale: str) -> str:
        return "BF16"

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        whole = tensors[self.matrix_scale].reshape(())
        scales = tensors[self.scale].float()
        scales = scales / whole if self.is_reciprocal else scales * whole
        return (e2m1(unpaired(tensors[self.main])) * scales.repeat_interleave(BLOCK, 1)).to(torch.bfloat16)


MODELOPT = Nvfp4(".weight", ".weight_scale_2", False, (".input_scale",))
COMPRESSED = Nvfp4(".weight_packed", ".weight_global_scale", True, (".input_global_scale",))


def parse_modelopt(fields: ConfigFields) -> Nvfp4:
    """Raises ModelError naming the field."""
    fields.one_of("quant_algo", "NVFP4")
    fields.one_of("kv_cache_quant_algo", None)
    fields.one_of("kv_cache_scheme", None)
    return MODELOPT


def parse_compressed(group: ConfigFields) -> Nvfp4:
    """`group`: the only one of config_groups. Raises ModelError naming the field."""
    weights = group.section("weights")
    weights.one_of("type", "float")
    weights.one_of("num_bits", 4)
    weights.one_of("group_size", BLOCK)
    weights.one_of("symmetric", None, True)
    weights.one_of("strategy", "tensor_group", "group")
    return COMPRESSED
