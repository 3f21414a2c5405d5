"""GPU sums in leaves: one order for every number of rows and every tile, and the same on one worker as on several."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.linear import GpuLinearWeight, linear, pack_fp8_linear, pack_linear

pytestmark = pytest.mark.gpu

# (K, N, leaves): o_proj and down_proj of Qwen3-8B and Qwen3-0.6B, and odd ones
SHAPES = [(4096, 4096, 8), (12288, 4096, 8), (2048, 1024, 8), (3072, 1024, 8), (896, 384, 8), (192, 33, 4)]
ROWS = [1, 2, 7, 16, 17, 33, 64, 65, 100, 128, 129, 256, 257, 1000, 4096]


@pytest.fixture(autouse=True, scope="module")
def _configured() -> None:
    if torch.cuda.is_available():
        from sempre.kernels.linear.gpu import configure

        configure()


def _case(depth: int, columns: int, leaves: int, scheme: Fp8Scheme | None) -> tuple[torch.Tensor, GpuLinearWeight]:
    generator = torch.Generator("cuda").manual_seed(depth * 7 + columns)
    x = torch.randn(4096, depth, generator=generator, device="cuda").to(torch.bfloat16)
    weight = torch.randn(columns, depth, generator=generator, device="cuda") * depth**-0.5
    bias = torch.randn(columns, generator=generator, device="cuda").to(torch.bfloat16)
    if scheme is None:
        packed = pack_linear(weight.to(torch.bfloat16), bias, leaves)
    else:
        packed = pack_fp8_linear(*quantize_channels(weight), bias, scheme, leaves)
    assert isinstance(packed, GpuLinearWeight)
    return x, packed


def _run(x: torch.Tensor, w: GpuLinearWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return linear(x, w, torch.full((len(x), w.out_features), float("nan"), device="cuda", dtype=dtype))


@pytest.mark.parametrize("scheme", [None, *Fp8Scheme], ids=str)
@pytest.mark.parametrize(("depth", "columns", "leaves"), SHAPES)
def test_rows_do_not_depend_on_their_number_or_place(
    depth: int, columns: int, leaves: int, scheme: Fp8Scheme | None
) -> None:
    x, w = _case(depth, columns, leaves, scheme)
    alone = torch.cat([_run(x[i : i + 1], w) for i in range(128)])
    for rows in ROWS:
        start = min(7, 4096 - rows)
        count = min(rows, 128 - start)
        assert torch.equal(_run(x[start : start + rows], w)[:count], alone[start : start + count]), f"{rows} rows"


@pytest.mark.parametrize(("depth", "columns", "leaves"), SHAPES)
def test_the_order_is_a_balanced_binary_tree(depth: int, columns: int, leaves: int) -> None:
    x, w = _case(depth, columns, leaves, None)
    assert w.bias is not None
    for rows in (1, 64, 65, 1000):
        sums = [
            _run(part.contiguous(), GpuLinearWeight(own.contiguous(), None))
            for part, own in zip(x[:rows].chunk(leaves, 1), w.weight.chunk(leaves, 1), strict=True)
        ]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        assert torch.equal(_run(x[:rows], w), sums[0] + w.bias.float()), f"{rows} rows"
    exact = reference.linear(x[:300], w.weight, w.bias)
    assert (_run(x[:300], w) - exact).norm() / exact.norm() < 1e-6 + depth / 16 * 2**-24
    one_chain = GpuLinearWeight(w.weight, w.bias)
    assert not torch.equal(_run(x[:300], one_chain), _run(x[:300], w)), "the control: one chain gives other bits"


@pytest.mark.parametrize("scheme", [None, *Fp8Scheme], ids=str)
@pytest.mark.parametrize(("depth", "columns", "leaves"), SHAPES[:4])
def test_every_tile_agrees(depth: int, columns: int, leaves: int, scheme: Fp8Scheme | None) -> None:
    from sempre.kernels.linear.gpu_check import disagreeing

    _, w = _case(depth, columns, leaves, scheme)
    assert disagreeing(w, torch.bfloat16, max_rows=4096) == {}
