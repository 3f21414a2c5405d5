"""Sums in leaves: the documented order, and the same bits from any number of workers."""

from __future__ import annotations

from dataclasses import replace

import kernel_reference as reference
import pytest
import torch
from matmul_order import product_in_order

from sempre.kernels.fp8 import Fp8Scheme, quantize_channels, quantize_rows
from sempre.kernels.linear import (
    CpuLinearWeight,
    linear,
    pack_fp8_linear,
    pack_linear,
    partial_linear,
    sum_partials,
)

ROWS = 30
# (K, N, leaves): chains of 64 with and without a rest, a last panel that is partial
CASES = [(128, 64, 8), (384, 96, 2), (896, 384, 8), (192, 33, 4), (1040, 5, 1)]
SCHEMES = [None, Fp8Scheme.WEIGHTS, Fp8Scheme.WEIGHTS_AND_ACTIVATIONS]


class Case:
    """A weight as a whole and as the workers hold it."""

    def __init__(self, depth: int, columns: int, leaves: int, scheme: Fp8Scheme | None = None) -> None:
        generator = torch.Generator().manual_seed(depth + columns)
        self.x = torch.randn(ROWS, depth, generator=generator)
        self.weight = torch.randn(columns, depth, generator=generator) * depth**-0.5
        self.bias = torch.randn(columns, generator=generator)
        self.leaves, self.scheme = leaves, scheme
        self.quantized = quantize_channels(self.weight)

    def packed(self, *, ranks: int = 1, rank: int = 0) -> CpuLinearWeight:
        own = slice(rank * self.weight.shape[1] // ranks, (rank + 1) * self.weight.shape[1] // ranks)
        leaves = self.leaves // ranks
        if self.scheme is None:
            return pack_linear(self.weight[:, own], self.bias, leaves)
        return pack_fp8_linear(self.quantized.values[:, own], self.quantized.scale, self.bias, self.scheme, leaves)

    def whole(self, rows: slice = slice(ROWS)) -> torch.Tensor:
        x = self.x[rows].contiguous()
        return linear(x, self.packed(), torch.full((len(x), len(self.weight)), float("nan")))

    def over(self, ranks: int) -> torch.Tensor:
        partials = torch.full((ranks, ROWS, len(self.weight)), float("nan"))
        for rank, x in enumerate(self.x.chunk(ranks, 1)):
            partial_linear(x.contiguous(), self.packed(ranks=ranks, rank=rank), partials[rank])
        return sum_partials(partials, self.packed(), torch.full_like(partials[0], float("nan")))


def in_order(case: Case) -> torch.Tensor:
    """The tree written out, one leaf after the other."""
    leaves = [
        torch.from_numpy(product_in_order(x.numpy(), weight.numpy()))
        for x, weight in zip(case.x.chunk(case.leaves, 1), case.weight.chunk(case.leaves, 1), strict=True)
    ]
    while len(leaves) > 1:
        leaves = [left + right for left, right in zip(leaves[::2], leaves[1::2], strict=True)]
    return leaves[0] + case.bias


@pytest.mark.parametrize(("depth", "columns", "leaves"), CASES)
def test_the_order_is_a_balanced_binary_tree(depth: int, columns: int, leaves: int) -> None:
    case = Case(depth, columns, leaves)
    assert torch.equal(case.whole(), in_order(case))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("depth", "columns", "leaves"), CASES)
def test_any_number_of_workers_gives_the_same_bits(
    depth: int, columns: int, leaves: int, scheme: Fp8Scheme | None
) -> None:
    case = Case(depth, columns, leaves, scheme)
    for ranks in [size for size in (1, 2, 4, 8) if size <= leaves]:
        assert torch.equal(case.over(ranks), case.whole()), ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_does_not_depend_on_the_others(scheme: Fp8Scheme | None, dtype: torch.dtype) -> None:
    case = Case(896, 96, 8, scheme)
    case.weight = case.weight.to(dtype)
    whole = case.whole()
    for rows in (slice(1), slice(3, 5), slice(2, 25), slice(1, ROWS)):
        assert torch.equal(case.whole(rows), whole[rows])


@pytest.mark.parametrize(("depth", "columns", "leaves"), CASES)
def test_accuracy_against_float64(depth: int, columns: int, leaves: int) -> None:
    case = Case(depth, columns, leaves)
    expected = reference.linear(case.x, case.weight, case.bias)
    assert (case.whole() - expected).norm() / expected.norm() < 2.5e-7


def test_activations_have_a_scale_for_each_leaf() -> None:
    """Numbers beside much larger ones survive in another leaf, and with one scale are rounded to nothing."""
    case = Case(128, 64, 8, Fp8Scheme.WEIGHTS_AND_ACTIVATIONS)
    case.weight[:, :16] = 0.0
    case.quantized = quantize_channels(case.weight)
    case.x[:, :16] *= 2.0**20
    case.bias.zero_()
    values, scales = quantize_rows(case.x.reshape(ROWS * 8, 16))
    x = (values * scales[:, None]).view(ROWS, 128)
    expected = reference.linear(x, case.quantized.values.float() * case.quantized.scale[:, None])
    assert (case.whole() - expected).norm() / expected.norm() < 2.5e-7
    case.leaves = 1
    assert (case.whole() == 0.0).all()


def test_control_another_order_of_sums_gives_other_bits() -> None:
    case = Case(896, 384, 8)
    assert not torch.equal(case.whole(), Case(896, 384, 1).whole())
    partials = torch.empty(4, ROWS, 384)
    for rank, x in enumerate(case.x.chunk(4, 1)):
        partial_linear(x.contiguous(), case.packed(ranks=4, rank=rank), partials[rank])
    weight, out = case.packed(), torch.empty(ROWS, 384)
    assert torch.equal(sum_partials(partials, weight, out), case.whole())
    assert not torch.equal(sum_partials(partials[[0, 2, 1, 3]].contiguous(), weight, out), case.whole())
    partials[2] = 0.0
    assert not torch.equal(sum_partials(partials, weight, out), case.whole())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1, 2, 4 or 8 leaves of a multiple of 16, found 8 of K = 64"):
        pack_linear(torch.ones(3, 64), None, 8)
    with pytest.raises(ValueError, match="expected 1, 2, 4 or 8 leaves"):
        pack_linear(torch.ones(3, 96), None, 3)
    weight = pack_linear(torch.ones(3, 64), None, 2)
    with pytest.raises(ValueError, match="a power of two of workers"):
        sum_partials(torch.ones(3, 2, 3), weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match="do not fit a weight of 3 x 64"):
        sum_partials(torch.ones(2, 2, 4), replace(weight), torch.ones(2, 4))
