"""fp8 matrices with a float32 scale for each block, as DeepSeek-V3 has them (arXiv 2412.19437); only weights are fp8.

Values are those of the published dequantiser: number * scale, rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.widened import Shape
from sempre.workers.tensor_source import FP8_NAME, Parameter


@dataclass(frozen=True)
class Fp8Blocks:
    """`.weight` [N, K] fp8, `.weight_scale_inv` [ceil(N / rows), ceil(K / columns)], which are scales."""

    rows: int
    columns: int
    name = "fp8 in blocks"
    main = ".weight"
    scale = ".weight_scale_inv"

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[0], main[1]

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        blocks = -(-out_features // self.rows), -(-in_features // self.columns)
        return {
            ".weight": Parameter((out_features, in_features), (FP8_NAME,)),
            ".weight_scale_inv": Parameter(blocks, ("F32", "BF16")),
        }

    def optional(self) -> dict[str, Parameter]:
        return {}

    def dtype_name(self, scale: str) -> str:
        return "BF16"

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight, scales = tensors[".weight"], tensors[".weight_scale_inv"].float()
        out_features, in_features = weight.shape
        whole = scales.repeat_interleave(self.rows, 0)[:out_features].repeat_interleave(self.columns, 1)
        return (weight.float() * whole[:, :in_features]).to(torch.bfloat16)


def parse_fp8_blocks(fields: ConfigFields) -> Fp8Blocks:
    """Raises ModelError naming the field."""
    fields.one_of("activation_scheme", "dynamic")
    fields.one_of("fmt", None, "e4m3")
    fields.one_of("scale_fmt", None)
    sizes = fields.raw.get("weight_block_size")
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        fields.fail("weight_block_size", "two sizes, of rows and of columns", sizes)
    return Fp8Blocks(*sizes)
