"""The fp8 kernels in Triton's interpreter. It has no tensor cores, so their narrow accumulator does not appear here."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.fp8 import FP8, Fp8Scheme, quantize_channels, quantize_rows
from sempre.kernels.linear import GpuLinearWeight


def _case(depth: int, columns: int, scheme: Fp8Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, GpuLinearWeight]:
    generator = torch.Generator().manual_seed(depth + columns)
    x = (torch.randn(37, depth, generator=generator) * torch.logspace(-1, 1, 37)[:, None]).to(dtype)
    weight = torch.randn(columns, depth, generator=generator) * torch.logspace(-2, 0, columns)[:, None]
    bias = torch.randn(columns, generator=generator).to(dtype)
    values, scale = quantize_channels(weight)
    return x, GpuLinearWeight(values, bias, scale=scale, scheme=scheme)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    from sempre.kernels.fp8 import gpu

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 96, generator=generator) * torch.logspace(-4, 3, 96)
    x[3] = 0.0
    x = x.to(dtype)
    expected, expected_scale = quantize_rows(x.float())
    values, scale = gpu.quantize_rows(x, torch.empty(20, 96).to(FP8), torch.full((20,), float("nan")))
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values.float(), expected)


@pytest.mark.parametrize("scheme", list(Fp8Scheme), ids=lambda scheme: scheme.value)
@pytest.mark.parametrize(("depth", "columns"), [(96, 70), (256, 64)])
def test_linear(depth: int, columns: int, scheme: Fp8Scheme) -> None:
    from sempre.kernels.fp8 import gpu as quantize_gpu
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import FP8_REFERENCE, Tile

    x, w = _case(depth, columns, scheme, torch.float16)
    assert w.scale is not None
    values, scales, taken = x, None, x.double()
    if scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        values, scales = quantize_gpu.quantize_rows(x, torch.empty(x.shape).to(FP8), torch.empty(37))
        taken = values.double() * scales.double()[:, None]
    expected = reference.linear(taken, w.weight.double() * w.scale.double()[:, None], w.bias)
    for tile in (FP8_REFERENCE, Tile(16, 16, 128, 1, 3), Tile(32, 32, 256, 2, 2)):
        out = gpu.run_tile(values, w, torch.full((37, columns), float("nan")), tile, scales)
        assert (out - expected).norm() / expected.norm() < 1e-6
        lone = None if scales is None else scales[5:6]
        alone = gpu.run_tile(values[5:6].contiguous(), w, torch.empty(1, columns), tile, lone)
        assert torch.equal(alone[0], out[5])
