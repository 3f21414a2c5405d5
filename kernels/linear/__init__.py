"""Matmul of activations with a weight: out[t, n] = sum over k of x[t, k] * weight[n, k] (+ bias[n]).

Contract: every output element is summed in float32 over k ascending, starting at 0; the bias is added last. So a row's
result depends only on that row and the weight: not on the number of rows, its place among them, the tile that computed
it, or the number of threads. On CPU each chain of 64 terms is one fused multiply-add per term, chains are added in
order, and 16-bit and fp8 weights are widened exactly; on a GPU the steps are the tensor core's own, K is never split,
and x has the weight's dtype.

On a CPU a bfloat16 weight may be packed so that x is rounded to bfloat16 too, to nearest, ties to even. Each output is
then one chain over all of k ascending, one fused multiply-add per term, each of which reads subnormal numbers as zero
and flushes a subnormal result to zero; an odd K has a last term of zero. That is what the instruction VDPBF16PS does,
two terms at a time; CPUs without it take the same steps one at a time, with equal bits.

fp8 weights: the accumulator is multiplied by the scale of x's row, if the scheme quantises x (`kernels.fp8`), then by
the scale of the output channel, each product rounded to float32, and the bias is added after.

A weight may have K in L equal leaves, L a power of two up to 8. Each leaf is summed as above, starting at 0, and the
leaves are added as a balanced binary tree, ((0+1)+(2+3))+((4+5)+(6+7)), in float32. x is quantised leaf by leaf, and a
leaf's sum multiplied by its own scale before it is added. So workers that own whole subtrees each pass one partial sum
(`partial_linear`), and `sum_partials` goes on with the same tree: the bits do not depend on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.checks import check_rows
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.lazy_module import LazyModule
from sempre.kernels.linear.control import control_linear, control_pack, control_pack_fp8
from sempre.kernels.linear.weights import (
    ControlLinearWeight,
    CpuLinearWeight,
    GpuLinearWeight,
    GroupRows,
    WeightGroup,
)

if TYPE_CHECKING:
    from sempre.kernels.linear import cpu as _cpu
    from sempre.kernels.linear import cpu_groups as _cpu_groups
    from sempre.kernels.linear import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _cpu_groups = LazyModule(__name__, "cpu_groups")
    _gpu = LazyModule(__name__, "gpu")

__all__ = [
    "ControlLinearWeight",
    "CpuLinearWeight",
    "GpuLinearWeight",
    "GroupRows",
    "WeightGroup",
    "control_linear",
    "control_pack",
    "control_pack_fp8",
    "gated_linear",
    "group_linear",
    "group_weights",
    "linear",
    "pack_bfloat16_linear",
    "pack_fp8_linear",
    "pack_linear",
    "partial_linear",
    "sum_partials",
]

MAX_LEAVES = 8


def pack_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, leaves: int = 1
) -> CpuLinearWeight | GpuLinearWeight:
    """Prepare `weight` [N, K] and `bias` [N]: packed in panels on CPU, unchanged on a GPU. ValueError for leaves that
    do not fit."""
    _check_leaves("pack_linear", weight, leaves)
    if weight.is_cuda:
        bias = bias.to(weight.dtype).contiguous() if bias is not None else None
        return GpuLinearWeight(weight.contiguous(), bias, leaves=leaves)
    return _cpu.pack_linear(weight, bias, leaves)


def pack_bfloat16_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, leaves: int = 1
) -> CpuLinearWeight | GpuLinearWeight:
    """Like `pack_linear`; x is rounded to bfloat16 as well, where a weight on a CPU has that dtype."""
    if weight.is_cuda or weight.dtype is not torch.bfloat16:
        return pack_linear(weight, bias, leaves)
    _check_leaves("pack_bfloat16_linear", weight, leaves)
    return _cpu.pack_bfloat16_linear(weight, bias, leaves)


def pack_fp8_linear(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scheme: Fp8Scheme, leaves: int = 1
) -> CpuLinearWeight | GpuLinearWeight:
    """Like `pack_linear`, for the fp8 `weight` [N, K] without NaN, times `scale` [N]."""
    _check_leaves("pack_fp8_linear", weight, leaves)
    if weight.is_cuda:
        return GpuLinearWeight(
            weight.contiguous(), bias, scale=scale.float().contiguous(), scheme=scheme, leaves=leaves
        )
    return _cpu.pack_fp8_linear(weight, scale, bias, scheme, leaves)


def _check_leaves(operation: str, weight: torch.Tensor, leaves: int) -> None:
    depth = int(weight.shape[1])
    if leaves not in (1, 2, 4, 8) or depth % (16 * leaves) * (leaves > 1):
        raise ValueError(
            f"{operation}: expected 1, 2, 4 or 8 leaves of a multiple of 16, found {leaves} of K = {depth}"
        )


def linear(x: torch.Tensor, w: CpuLinearWeight | GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """x [T, K] times the prepared weight into out [T, N]; both contiguous. Returns `out`.

    CPU: x and out float32. GPU: x in the weight's dtype (any, if that is fp8), out in x's or float32.
    """
    _check("linear", x, w, out, w.out_features)
    if not x.shape[0]:
        return out
    if not isinstance(w, GpuLinearWeight):
        return _cpu.linear(x, w, out)
    return _gpu.linear(x, w, out)


def partial_linear(x: torch.Tensor, w: CpuLinearWeight | GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """Like `linear` into float32 `out`, without the scales of channels and the bias: a worker's share of a sum over
    several."""
    _check("partial_linear", x, w, out, w.out_features)
    if not x.shape[0]:
        return out
    if isinstance(w, GpuLinearWeight):
        return _gpu.linear(x, replace(w, scale=None, bias=None), out)
    return _cpu.partial_linear(x, w, out)


def sum_partials(partials: torch.Tensor, w: CpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """Add the workers' `partials` float32 [R, T, N] as a balanced binary tree, R a power of two; times the scales of
    channels, plus the bias, into out [T, N]. All contiguous; returns `out`."""
    ranks = partials.shape[0]
    if ranks & (ranks - 1) or partials.shape[1:] != out.shape or out.shape[1] != w.out_features:
        raise ValueError(
            f"sum_partials: partials {tuple(partials.shape)} and out {tuple(out.shape)} do not fit a weight of"
            f" {w.out_features} x {w.in_features} and a power of two of workers"
        )
    if not out.shape[0]:
        return out
    return _cpu.sum_partials(partials, w, out)


def group_weights(weights: Sequence[object]) -> WeightGroup | None:
    """Prepare several weights on a CPU for `group_linear`; None unless they are alike in shape, dtype and scheme, and K
    is summed in one piece."""
    if not all(isinstance(w, CpuLinearWeight) for w in weights):
        return None
    return _cpu_groups.group_weights(weights)


def group_linear(x: torch.Tensor, group: WeightGroup, rows: GroupRows, out: torch.Tensor) -> torch.Tensor:
    """Row `x_rows[p]` of x [R, K] times its weight, into row `out_rows[p]` of out [S, N], for each p of `rows`; other
    rows stay as they are. On a CPU; both contiguous, and every row that is named exists. Returns `out`."""
    check_rows("group_linear", x, out)
    w = group.weights[0]
    if x.shape[1] != w.in_features or out.shape[1] != w.out_features or len(rows.starts) != len(group.weights) + 1:
        raise ValueError(
            f"group_linear: x {tuple(x.shape)}, out {tuple(out.shape)} and starts of {len(rows.starts)} do not fit"
            f" {len(group.weights)} weights of {w.out_features} x {w.in_features}"
        )
    return _cpu_groups.group_linear(x, group, rows, out)


def gated_linear(
    x: torch.Tensor,
    w: CpuLinearWeight | GpuLinearWeight,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    activation: Activation = Activation.SILU,
) -> torch.Tensor:
    """`linear` with w [2 I, K] (gates first), then `activation.and_mul`, into out [T, I]; gate_up [T, 2 I] is scratch.

    The bits are those of the two calls; a GPU may run them as one.
    """
    if not isinstance(w, GpuLinearWeight):
        return activation.and_mul(linear(x, w, gate_up), out)
    _check("gated_linear", x, w, out, w.out_features // 2)
    if not x.shape[0]:
        return out
    return _gpu.gated_linear(x, w, gate_up, out, activation)


def _check(
    operation: str, x: torch.Tensor, w: CpuLinearWeight | GpuLinearWeight, out: torch.Tensor, columns: int
) -> None:
    check_rows(operation, x, out)
    if x.shape[1] != w.in_features or out.shape[0] != x.shape[0] or out.shape[1] != columns:
        raise ValueError(
            f"{operation}: x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of"
            f" {w.out_features} x {w.in_features}"
        )
    if isinstance(w, GpuLinearWeight) and w.scheme is None and x.dtype != w.weight.dtype:
        raise TypeError(f"{operation}: x is {x.dtype}, the weight {w.weight.dtype}; on a GPU they must be the same")
