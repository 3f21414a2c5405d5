"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 4-bit numbers that share a power of two; widened while loading.

A number has a sign, 2 bits of exponent and 1 of mantissa (e2m1); the scale of a block is 2 ** (byte - 127), and 255 is
NaN. Every product is exact in bfloat16, so widened matrices have the bits of a checkpoint that holds these values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.quantization.config import Mxfp4Spec
from sempre.workers.quantization.method import QuantizationMethod
from sempre.workers.quantization.plain import PLAIN, PLAIN_SUFFIX
from sempre.workers.tensor_source import Parameter, mismatch

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
BYTES = ("U8",)

# of the codes 0 to 7; the fourth bit is the sign
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# with a larger one not every number is finite in bfloat16
LARGEST_SCALE = 252
# the bits of float32's 2 ** -127, which has no exponent of its own
_SMALLEST = 1 << 22


def widen(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [N, K / 32, 16], of two numbers each with the first in the lower bits, and scales uint8 [N, K / 32]
    → bfloat16 [N, K], exactly."""
    signed = [*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)]
    both = torch.tensor(signed, dtype=torch.float32, device=blocks.device)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32)
    powers = torch.where(exponents > 0, exponents << 23, _SMALLEST).view(torch.float32)
    return (both[codes.int()] * powers[..., None]).to(torch.bfloat16).flatten(1)


class Mxfp4:
    """`_blocks` [N, K / 32, 16] and `_scales` [N, K / 32]."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, Parameter]:
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
