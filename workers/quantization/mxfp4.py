"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 4-bit numbers that share a power of two; widened while loading.

A number has a sign, 2 bits of exponent and 1 of mantissa (e2m1); the scale of a block is 2 ** (byte - 127), and 255 is
NaN. Every product is exact in bfloat16, so widened matrices have the bits of a checkpoint that holds these values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sempre.kernels.packed import CodeForm, Codes, Numbers
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.quantization.config import Mxfp4Spec
from sempre.workers.quantization.method import QuantizationMethod
from sempre.workers.quantization.plain import PLAIN, PLAIN_SUFFIX
from sempre.workers.quantization.widened import Shape, groups_of
from sempre.workers.tensor_source import Parameter, mismatch

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
BYTES = ("U8",)

# with a larger one not every number is finite in bfloat16
LARGEST_SCALE = 252
FORM = CodeForm(4, BLOCK, numbers=Numbers.E2M1)


def widen(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [N, K / 32, 16], of two numbers each with the first in the lower bits, and scales uint8 [N, K / 32]
    → bfloat16 [N, K], exactly."""
    return Codes(blocks.flatten(1), scales, None, FORM).values()


class Mxfp4:
    """`_blocks` [N, K / 32, 16] and `_scales` [N, K / 32]."""

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        blocks = in_features // BLOCK
        return {
            BLOCKS: Parameter((out_features, blocks, BLOCK // 2), BYTES, elements=2),
            SCALES: Parameter((out_features, blocks), BYTES, elements=0),
        }

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        plain = {module: {PLAIN_SUFFIX: _finite(module, tensors)} for module, tensors in parts.items()}
        return PLAIN.pack(plain, bias, kernel, as_matrix)


def _finite(module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    largest = int(tensors[SCALES].max())
    if largest > LARGEST_SCALE:
        raise mismatch(module + SCALES, f"scales of at most {LARGEST_SCALE} (2 ** {LARGEST_SCALE - 127})", str(largest))
    return widen(tensors[BLOCKS], tensors[SCALES])


class Mxfp4Quantization:
    """The matrices whose names end as the spec says are MXFP4, the others plain."""

    def __init__(self, spec: Mxfp4Spec) -> None:
        self._spec = spec
        self._mxfp4 = Mxfp4()

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        return self._mxfp4 if all(module.endswith(self._spec.targets) for module in modules) else PLAIN


@dataclass(frozen=True)
class Mxfp4Packed:
    """As compressed-tensors stores it: `.weight_packed` [N, K / 2] and `.weight_scale` [N, K / 32]."""

    name = "mxfp4"
    main = ".weight_packed"
    scale = ".weight_scale"
    group_index = None

    def sizes(self, main: Shape) -> tuple[int, int]:
        return main[0], 2 * main[1]

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        groups, _ = groups_of(in_features, BLOCK)
        return {
            self.main: Parameter((out_features, in_features // 2), BYTES),
            self.scale: Parameter((out_features, groups), BYTES),
        }

    def optional(self) -> dict[str, Parameter]:
        return {}

    def dtype_name(self, scale: str) -> str:
        return "BF16"

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.codes(tensors).values()

    def form(self) -> CodeForm:
        return FORM

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> Codes:
        return Codes(tensors[self.main], tensors[self.scale], None, FORM)


def parse_mxfp4_packed(group: ConfigFields) -> Mxfp4Packed:
    """`group`: the only one of config_groups. Raises ModelError naming the field."""
    group.one_of("input_activations", None)
    weights = group.section("weights")
    weights.one_of("type", "float")
    weights.one_of("num_bits", 4)
    weights.one_of("group_size", BLOCK)
    return Mxfp4Packed()
