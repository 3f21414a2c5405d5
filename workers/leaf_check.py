"""A sum in leaves, in two ways: for the start-up self-test of a CPU."""

from __future__ import annotations

import torch

from sempre.kernels.fp8 import quantize_channels
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

    def multiply(x: torch.Tensor, weight: torch.Tensor, *leaves: int) -> torch.Tensor:
        if like.scheme is None:
            packed = kernel.pack(weight, None, *leaves)
        else:
            ones = torch.ones(len(weight), dtype=torch.float32, device=CPU)
            packed = kernel.pack_fp8(weight, ones, None, like.scheme, *leaves)
        return kernel.linear(x, packed, torch.empty(len(x), len(weight), dtype=torch.float32, device=CPU))

    values = weight.to(matrix_dtype) if like.scheme is None else quantize_channels(weight).values
    parts = zip(x.chunk(leaves, 1), values.chunk(leaves, 1), strict=True)
    sums = [multiply(own.contiguous(), part) for own, part in parts]
    while len(sums) > 1:
        sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0], multiply(x, values, leaves)
