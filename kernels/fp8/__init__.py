"""Quantisation to fp8 (float8_e4m3fn: 3 bits of mantissa, at most 448): one scale per row, never per batch.

Contract, for a row of activations and for an output channel of a weight alike: scale = max(amax / 448, 2**-64) in
float32, and the element is x / scale rounded to the nearest fp8 value, ties to even. Both divisions follow IEEE 754,
and a maximum does not depend on its order. So the result depends only on the row, and is the same on every device.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.fp8 import cpu as _cpu
    from sempre.kernels.fp8 import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["FP8", "LARGEST", "SMALLEST_SCALE", "Fp8Scheme", "QuantizedWeight", "quantize_channels", "quantize_rows"]

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# avoids a division by zero for a row of zeros
SMALLEST_SCALE = 2.0**-64


class Fp8Scheme(Enum):
    """Which operands of a matmul are fp8; the values are those of the engine's setting `quantization`."""

    WEIGHTS = "fp8_weight_only"
    """W8A16: activations stay as they are"""
    WEIGHTS_AND_ACTIVATIONS = "fp8"
    """W8A8: each row of activations is quantised before the matmul"""


class QuantizedWeight(NamedTuple):
    """`values` [N, K] fp8 times `scale` [N] float32."""

    values: torch.Tensor
    scale: torch.Tensor


def quantize_channels(weight: torch.Tensor) -> QuantizedWeight:
    """Quantise `weight` [N, K] per output channel, on its device."""
    wide = weight.float()
    greatest = wide.abs().amax(dim=1)
    # by a tensor: a GPU divides by a number through its reciprocal, which rounds differently
    scale = (greatest / torch.full_like(greatest, LARGEST)).clamp_min(SMALLEST_SCALE)
    return QuantizedWeight((wide / scale[:, None]).to(FP8), scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K], contiguous, K a multiple of 16 → quantised [T, K] and scale [T] float32.

    On the CPU x is float32, and the fp8 values are returned widened to float32; on a GPU they are fp8.
    A row with NaN or infinity has NaN among its values.
    """
    check_rows("quantize_rows", x, x)
    rows, width = x.shape
    if width % 16:
        raise ValueError(f"quantize_rows: expected a row length that is a multiple of 16, found {width}")
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x, dtype=FP8 if x.is_cuda else None)
    if not rows:
        return out, scale
    if not x.is_cuda:
        return _cpu.quantize_rows(x, out, scale)
    return _gpu.quantize_rows(x, out, scale)
