"""Random weights of integers, and a sum in leaves in two ways: for the start-up self-test of a CPU."""

from __future__ import annotations

import torch

from sempre.kernels.fp8 import quantize_channels
from sempre.kernels.integers import GroupedIntegers, IntegerWeight, Layout
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.tensor_source import CPU

_COLUMNS = 32


def leaves_apart_and_together(
    x: torch.Tensor, like: LinearWeight, kernel: LinearKernel, matrix_dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] by a random weight [32, K] in the leaves and the format of another: a matmul of each leaf, added as a
    balanced binary tree, and the matmul of all."""
    leaves = like.leaves
    weight = torch.randn(_COLUMNS, like.in_features, generator=generator, dtype=torch.float32, device=CPU)

    if isinstance(like, IntegerWeight):
        integers = integers_like(like, weight)

        def pack(own: range, *leaves: int) -> LinearWeight:
            return kernel.pack_integers([matrix.inputs(own) for matrix in integers], None, like.scheme, *leaves)

    elif like.scheme is None:
        values = weight.to(matrix_dtype)

        def pack(own: range, *leaves: int) -> LinearWeight:
            return kernel.pack(values[:, own.start : own.stop], None, *leaves)

    else:
        values, ones = quantize_channels(weight).values, torch.ones(_COLUMNS, dtype=torch.float32, device=CPU)

        def pack(own: range, *leaves: int) -> LinearWeight:
            return kernel.pack_fp8(values[:, own.start : own.stop], ones, None, like.scheme, *leaves)

    def multiply(own: range, *leaves: int) -> torch.Tensor:
        packed = pack(own, *leaves)
        out = torch.empty(len(x), packed.out_features, dtype=torch.float32, device=CPU)
        return kernel.linear(x[:, own.start : own.stop].contiguous(), packed, out)

    depth = like.in_features // leaves
    sums = [multiply(range(start, start + depth)) for start in range(0, like.in_features, depth)]
    while len(sums) > 1:
        sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0], multiply(range(like.in_features), leaves)


def layouts(weight: LinearWeight) -> tuple[Layout, ...]:
    """Of a weight of integers; none of others."""
    return tuple(part.layout for part in weight.parts) if isinstance(weight, IntegerWeight) else ()


def integers_like(like: IntegerWeight, numbers: torch.Tensor) -> list[GroupedIntegers]:
    """A matrix of each layout with codes over its whole range, by random numbers [N, K], which also become scales."""
    return [_random_integers(numbers, layout) for layout in dict.fromkeys(layouts(like))]


def _random_integers(numbers: torch.Tensor, layout: Layout) -> GroupedIntegers:
    most = (1 << layout.bits) - 1
    codes = (numbers.view(torch.int32) & most) - layout.offset
    scale = numbers[:, :: layout.group].contiguous()
    return GroupedIntegers(codes.to(torch.int8), scale, scale.flip(0) if layout.has_minimum else None)
