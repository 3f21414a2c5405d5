"""fp8 on a GPU: rows quantised as on the CPU, accuracy, equal bits for every number of rows and every tile."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.activation import silu_and_mul
from sempre.kernels.fp8 import Fp8Scheme, quantize_channels, quantize_rows
from sempre.kernels.linear import GpuLinearWeight, gated_linear, linear, pack_fp8_linear

pytestmark = pytest.mark.gpu

SCHEMES = list(Fp8Scheme)
# (K, N) of Qwen3-8B and Qwen3-0.6B, and odd ones
REAL = [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096), (1024, 4096), (2048, 1024), (3072, 1024)]
ODD = [(576, 960), (96, 33), (64, 1), (4112, 1000)]
ROWS = [2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 512, 777, 2000, 4096]


def _case(
    depth: int, columns: int, rows: int, scheme: Fp8Scheme, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> tuple[torch.Tensor, GpuLinearWeight]:
    generator = torch.Generator("cuda").manual_seed(depth * 7 + columns)
    sizes = torch.logspace(-1, 1, rows, device="cuda")[:, None]
    x = (torch.randn(rows, depth, generator=generator, device="cuda") * sizes).to(dtype)
    values, scale = quantize_channels(torch.randn(columns, depth, generator=generator, device="cuda") * depth**-0.5)
    b = torch.randn(columns, generator=generator, device="cuda").to(dtype) if bias else None
    packed = pack_fp8_linear(values, scale, b, scheme)
    assert isinstance(packed, GpuLinearWeight)
    return x, packed


def _run(x: torch.Tensor, w: GpuLinearWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], w.out_features), float("nan"), device="cuda", dtype=out_dtype or x.dtype)
    return linear(x, w, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 576, 4096, 12288])
def test_rows_have_the_bits_of_the_cpu(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(300, width, generator=generator) * torch.logspace(-6, 2, width)).to(dtype)
    x[3] = 0.0
    expected, expected_scale = quantize_rows(x.float())
    values, scale = quantize_rows(x.cuda())
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(values.float().cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_quantised_as_on_the_cpu(dtype: torch.dtype) -> None:
    """All finite numbers up to a row's maximum, for maxima of every size, also subnormal; infinities and NaN."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    positive = finite[finite > 0].float()
    maxima = positive[:: len(positive) // 97]
    x = torch.zeros(len(maxima) + 2, len(finite), dtype=dtype)
    for row, maximum in zip(x, maxima, strict=False):
        row.copy_(finite.where(finite.abs() <= maximum.to(dtype), -maximum.to(dtype)))
    x[-2:] = finite
    x[-2, 7], x[-1, 9] = float("inf"), float("nan")
    expected, expected_scale = quantize_rows(x.float())
    values, scale = quantize_rows(x.cuda())
    assert torch.equal(scale[:-1].cpu(), expected_scale[:-1])
    found = values.float().cpu()
    assert torch.equal(found[:-2], expected[:-2])
    assert torch.equal(found[:-2].signbit(), expected[:-2].signbit())
    assert torch.equal(found[-2:].nan_to_num(), expected[-2:].nan_to_num())
    assert found[-2:].isnan().any(dim=1).all()


def test_channels_have_the_bits_of_the_cpu() -> None:
    weight = torch.randn(500, 640, generator=torch.Generator().manual_seed(1))
    expected, found = quantize_channels(weight), quantize_channels(weight.cuda())
    assert torch.equal(found.scale.cpu(), expected.scale)
    assert torch.equal(found.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize(("depth", "columns"), [*REAL[:2], REAL[3], *ODD])
def test_accuracy_against_float64(depth: int, columns: int, scheme: Fp8Scheme, bias: bool) -> None:
    for rows in (1, 33, 300):
        x, w = _case(depth, columns, rows, scheme, bias=bias)
        assert w.scale is not None
        taken = x.double()
        # the fp8 tensor cores keep about 14 bits of a sum of 128 products, and cut off the rest
        allowed = 2e-3
        if scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
            values, scales = quantize_rows(x)
            taken = values.double() * scales.double()[:, None]
        else:
            allowed = 2e-6 + depth / 16 * 2**-24
        expected = reference.linear(taken, w.weight.double() * w.scale.double()[:, None], w.bias)
        assert (_run(x, w, torch.float32) - expected).norm() / expected.norm() < allowed
        assert (_run(x, w) - expected).norm() / expected.norm() < 3e-3 + allowed


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize(("depth", "columns"), [*REAL, *ODD])
def test_rows_do_not_depend_on_their_number_or_place(
    depth: int, columns: int, scheme: Fp8Scheme, out_dtype: torch.dtype
) -> None:
    x, w = _case(depth, columns, 4096, scheme)
    alone = torch.cat([_run(x[i : i + 1], w, out_dtype) for i in range(256)])
    for rows in ROWS:
        start = min(7, 4096 - rows)
        found = _run(x[start : start + rows], w, out_dtype)
        count = min(rows, 256 - start)
        assert torch.equal(found[:count], alone[start : start + count]), f"{rows} rows"
        if rows > 256:
            last = _run(x[start + rows - 1 : start + rows], w, out_dtype)
            assert torch.equal(found[-1:], last), f"the last of {rows} rows"


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("depth", "columns"), REAL)
def test_every_tile_of_the_table_agrees(depth: int, columns: int, dtype: torch.dtype, scheme: Fp8Scheme) -> None:
    from sempre.kernels.linear.gpu_check import disagreeing

    _, w = _case(depth, columns, 1, scheme, dtype)
    assert disagreeing(w, dtype, max_rows=4096) == {}
    assert disagreeing(w, dtype, max_rows=1024, out_dtype=torch.float32) == {}


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("depth", "columns"), [(4096, 6144), (576, 960), (96, 24), (4112, 1000), (128, 8), (16, 136)])
def test_warps_have_the_bits_of_the_reference_tile(
    depth: int, columns: int, bias: bool, out_dtype: torch.dtype
) -> None:
    """Over rows and columns that end inside a tile, and steps of K that end inside 128."""
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import FP8_REFERENCE, Warps

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("programs of warpgroups are for compute capability 9.0")
    x, w = _case(
        depth, columns, 2500, Fp8Scheme.WEIGHTS_AND_ACTIVATIONS, torch.float16 if bias else torch.bfloat16, bias
    )
    for rows in (1, 63, 64, 65, 128, 200, 257, 1000, 2500):
        values, scales = gpu.operands(x[-rows:].contiguous(), w)
        out = [torch.full((rows + 1, columns), float("nan"), device="cuda", dtype=out_dtype) for _ in range(3)]
        gpu.run_tile(values, w, out[0][:rows], FP8_REFERENCE, scales)
        for warps, found in zip((Warps(256, 128, 4), Warps(128, 128, 5)), out[1:], strict=True):
            gpu.run_choice(values, w, found[:rows], warps, scales)
            assert torch.equal(found[:rows], out[0][:rows]), f"{rows} rows, {warps}"
            assert found[rows].isnan().all(), "nothing is written past the last row"


def test_control_a_tile_outside_the_fp8_tensor_cores_disagrees() -> None:
    """The comparison is able to fail: one warp computes in float16, whose sums are wider."""
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import FP8_REFERENCE, Tile

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("on sm_90 alone do the number of warps and the tile choose between two kinds of tensor core")
    x, w = _case(4096, 4096, 16, Fp8Scheme.WEIGHTS_AND_ACTIVATIONS)
    values, scales = gpu.operands(x, w)
    out = [torch.empty(16, 4096, device="cuda") for _ in range(2)]
    for tile, result in zip((FP8_REFERENCE, Tile(16, 16, 128, 1, 3)), out, strict=True):
        gpu.run_tile(values, w, result, tile, scales)
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
def test_activation_after_the_matmul(scheme: Fp8Scheme) -> None:
    for rows in (1, 16, 40, 300):
        x, w = _case(1024, 6144, rows, scheme)
        out = torch.full((rows, 3072), float("nan"), device="cuda", dtype=x.dtype)
        expected = silu_and_mul(_run(x, w), torch.empty_like(out))
        gate_up = torch.empty(rows, 6144, device="cuda", dtype=x.dtype)
        assert torch.equal(gated_linear(x, w, gate_up, out), expected)
