"""fp8 matrices with a scale per output channel (`kernels.fp8`), from the checkpoint or computed while loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sempre.kernels.fp8 import QuantizedWeight, quantize_channels
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.quantization.config import QuantizationSpec
from sempre.workers.quantization.method import QuantizationMethod
from sempre.workers.quantization.plain import PLAIN
from sempre.workers.tensor_source import FP8_NAME, Parameter, mismatch


class Fp8:
    """`.weight` [N, K], fp8 with `.weight_scale` if stored so in the checkpoint, else floats."""

    def __init__(self, spec: QuantizationSpec) -> None:
        self._spec = spec

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        if not self._spec.stored:
            return PLAIN.tensors(module, out_features, in_features)
        scale = (out_features, 1) if self._spec.weight_scales == "channel" else (1,)
        return {
            ".weight": Parameter((out_features, in_features), (FP8_NAME,)),
            ".weight_scale": Parameter(scale),
        }

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        quantized = [self._quantized(module, tensors) for module, tensors in parts.items()]
        # bytes: not every device can join fp8 tensors
        joined = torch.cat([part.values.view(torch.uint8) for part in quantized])
        values = joined.view(quantized[0].values.dtype)
        return kernel.pack_fp8(values, torch.cat([part.scale for part in quantized]), bias, self._spec.scheme)

    def _quantized(self, module: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        weight = tensors[".weight"]
        if self._spec.stored:
            scale = tensors[".weight_scale"].float().reshape(-1)
            quantized = QuantizedWeight(weight, scale.expand(weight.shape[0]))
        else:
            quantized = quantize_channels(weight)
        # fp8 has no infinity and two NaN patterns
        wrong = {
            ".weight_scale": ~quantized.scale.isfinite(),
            ".weight": (quantized.values.view(torch.uint8) & 0x7F) == 0x7F,
        }
        for suffix, where in wrong.items():
            if bool(where.any()):
                raise mismatch(module + suffix, "finite values", f"{int(where.sum())} that are not")
        return quantized


class Fp8Quantization:
    """Those matrices that the spec names are fp8, the others plain."""

    def __init__(self, spec: QuantizationSpec) -> None:
        self._spec = spec
        self._fp8 = Fp8(spec)

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        covered = [module for module in modules if self._spec.covers(module)]
        if not covered:
            return PLAIN
        for module in modules:
            if module not in covered:
                beside = f"fp8 like {', '.join(covered)}, with which it is one matmul"
                raise mismatch(module + ".weight", beside, "an ignored module")
        return self._fp8
