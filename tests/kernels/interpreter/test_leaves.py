"""GPU sums in leaves, in the interpreter: the order of the tree, with programs that walk it and with one for each
leaf."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.linear import GpuLinearWeight

ROWS = 70
# 70 rows have programs that walk all leaves, 40 have one for each leaf
CASES = [(128, 70, 8), (192, 33, 4), (96, 64, 2)]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("depth", "columns", "leaves"), CASES)
def test_the_order_is_a_balanced_binary_tree(depth: int, columns: int, leaves: int, dtype: torch.dtype) -> None:
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import REFERENCE, Tile

    x, weight, bias = (
        _random(ROWS, depth, dtype=dtype),
        _random(columns, depth, dtype=dtype),
        _random(columns).to(dtype),
    )
    w = GpuLinearWeight(weight, bias, leaves=leaves)
    for tile in (REFERENCE, Tile(16, 16, 16, 1, 3)):
        sums = [
            gpu.run_tile(part.contiguous(), GpuLinearWeight(own.contiguous(), None), torch.empty(ROWS, columns), tile)
            for part, own in zip(x.chunk(leaves, 1), weight.chunk(leaves, 1), strict=True)
        ]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        expected = sums[0] + bias.float()
        found = gpu.run_tile(x, w, torch.full((ROWS, columns), float("nan")), tile)
        assert torch.equal(found, expected)
        # the interpreter's own products depend on a row's place in its tile
        for count in (1, 40):
            few = gpu.run_tile(x[:count], w, torch.full((count, columns), float("nan")), tile)
            assert torch.equal(few, expected[:count])
    exact = reference.linear(x, weight, bias)
    assert (expected - exact).norm() / exact.norm() < 1e-6
    one_chain = gpu.run_tile(x, GpuLinearWeight(weight, bias), torch.empty(ROWS, columns), REFERENCE)
    assert not torch.equal(one_chain, expected), "the control: another order gives other bits"


@pytest.mark.parametrize("scheme", list(Fp8Scheme), ids=lambda scheme: scheme.value)
def test_fp8(scheme: Fp8Scheme) -> None:
    from sempre.kernels.fp8 import gpu as quantize_gpu
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import FP8_REFERENCE

    depth, columns, leaves = 256, 64, 8
    values, scale = quantize_channels(_random(columns, depth))
    w = GpuLinearWeight(values, _random(columns, dtype=torch.float16), scale=scale, scheme=scheme, leaves=leaves)
    x = _random(ROWS, depth, dtype=torch.float16)
    x[:, :32] *= 512.0
    taken, scales, used = x.double(), None, x
    if scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        parts = x.view(ROWS * leaves, depth // leaves)
        used, scales = quantize_gpu.quantize_rows(
            parts, torch.empty(parts.shape).to(values.dtype), torch.empty(len(parts))
        )
        taken = (used.double() * scales.double()[:, None]).view(ROWS, depth)
        used = used.view(ROWS, depth)
    expected = reference.linear(taken, values.double() * scale.double()[:, None], w.bias)
    found = gpu.run_tile(used, w, torch.full((ROWS, columns), float("nan")), FP8_REFERENCE, scales)
    assert (found - expected).norm() / expected.norm() < 1e-6
    lone = None if scales is None else scales[5 * leaves : 6 * leaves]
    alone = gpu.run_tile(used[5:6].contiguous(), w, torch.empty(1, columns), FP8_REFERENCE, lone)
    assert torch.equal(alone[0], found[5])


def test_no_leaves_for_the_library_and_tiles_whose_sums_do_not_fit() -> None:
    from sempre.kernels.linear.gpu_table import MOST_WAITING, Tile, choose

    for scheme in (None, *Fp8Scheme):
        w = GpuLinearWeight(torch.empty(4096, 4096), None, scheme=scheme, leaves=8)
        for rows in (1, 64, 65, 128, 257, 4096):
            choice = choose("sm_90", rows, w)
            assert isinstance(choice, Tile)
            assert choice.block_t * choice.block_n <= MOST_WAITING
