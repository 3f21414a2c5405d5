"""GPU linear layers: Triton tiles for few rows, the vendor's library without split-K for many. T rows, N out, K in.

Every output element is one float32 accumulator over ascending K, in the tensor cores' own steps; the scales of fp8
operands are applied to it and the bias is added in float32, and the result is rounded once. Weights are the left
operand, so that a few rows still fill a tensor-core tile.

fp8 weights with 16-bit activations are widened exactly to their dtype, and multiplied like weights of that dtype. The
accumulator of the fp8 tensor cores is narrower than float32, so every PROMOTED elements of K, counted from 0, their sum
is added to a float32 accumulator; the interval is the same in every tile, so that the result does not depend on it.

A weight whose K has leaves is never given to the library. For many rows a program walks the leaves one after the other
and holds up to three sums that wait; for few, each leaf has programs of its own, which keep more of the device busy,
and a second kernel adds their float32 sums on the same tree.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.activation import Activation
from sempre.kernels.activation.gpu import activate_and_mul, activated
from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.gpu_jit import CHAINED, architecture, jit, wait_for_previous
from sempre.kernels.linear.gpu_fp8 import run_warps
from sempre.kernels.linear.gpu_leaves import MOST_SPLIT_ROWS, run_split
from sempre.kernels.linear.gpu_table import FLOAT32, PROMOTED, Choice, Library, Tile, Warps, choose, choose_fused
from sempre.kernels.linear.gpu_tiles import accumulate, prefetch_rows, prefetched_lines, tree_sum
from sempre.kernels.linear.weights import GpuLinearWeight

# the first architecture with conversions and tensor cores for fp8
FP8_CAPABILITY = (8, 9)


def configure() -> None:
    """Set this process's matrix library: cuBLASLt, no split-K, no reduced precision. Call before any matmul."""
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_tf32 = False


@jit(runtime=("T",))
def _linear(
    x: Any,
    row_scales: Any,
    w: Any,
    scale: Any,
    bias: Any,
    out: Any,
    T: Any,
    N: Any,
    K: Any,
    D: Any,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """acc[n, t], the sum of LEAVES leaves of D = K / LEAVES elements, each over ascending k of w[n, k] x[t, k], times
    row_scales[t, leaf]; then * scale[n], + bias[n]; scales and bias if there."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # rows past the end repeat the last one and are not stored
    n_in, t_in = tl.minimum(n, N - 1), tl.minimum(t, T - 1)
    prefetch_rows(w, n_in, K, LINES)
    wait_for_previous()
    if LEAVES > 1:
        acc = tree_sum(x, row_scales, w, n_in, t_in, K, D, BN, BT, BK, EVEN_K, LEAVES, HAS_ROW_SCALES, PROMOTED)
    else:
        acc = accumulate(w, x, n_in, t_in, K, BN, BT, BK, EVEN_K, PROMOTED)
        if HAS_ROW_SCALES:
            acc *= tl.load(row_scales + t_in)[None, :]
    if HAS_SCALE:
        acc *= tl.load(scale + n_in)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n_in).to(tl.float32)[:, None]
    at = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(acc).to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@jit(runtime=("T",))
def _gated_linear(
    x: Any,
    w: Any,
    out: Any,
    T: Any,
    N: Any,
    K: Any,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """One program owns both halves, gate n and up n + N; each is rounded as the unfused matmul would store it."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_in, t_in = tl.minimum(n, N - 1), tl.minimum(t, T - 1)
    prefetch_rows(w, n_in, K, LINES)
    prefetch_rows(w, n_in + N, K, LINES)
    wait_for_previous()
    k = tl.arange(0, BK)
    gate_at = w + n_in.to(tl.int64)[:, None] * K + k[None, :]
    up_at = w + (n_in + N).to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + t_in.to(tl.int64)[None, :] * K + k[:, None]
    gate = tl.zeros([BN, BT], tl.float32)
    up = tl.zeros([BN, BT], tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            gate_tile, up_tile, x_tile = tl.load(gate_at), tl.load(up_at), tl.load(x_at)
        else:
            inside = start + k < K
            gate_tile = tl.load(gate_at, mask=inside[None, :], other=0.0)
            up_tile = tl.load(up_at, mask=inside[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
        gate = tl.dot(gate_tile, x_tile, gate, input_precision="ieee")
        up = tl.dot(up_tile, x_tile, up, input_precision="ieee")
        gate_at += BK
        up_at += BK
        x_at += BK
    dtype = out.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    value = activated(gate, up, ACTIVATION)
    at = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(value).to(dtype), mask=(t < T)[:, None] & (n < N)[None, :])


def operands(x: torch.Tensor, w: GpuLinearWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, K] in the matmul's dtype, and its scales [T * leaves]."""
    if w.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return x, None
    values, scales = quantize_rows(x.view(x.shape[0] * w.leaves, w.in_features // w.leaves))
    return values.view(x.shape), scales


def run_tile(
    x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, tile: Tile, row_scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear layer by one given tile; x is fp8 with `row_scales` [T, leaves], or of another dtype without."""
    rows, (columns, depth) = x.shape[0], w.weight.shape
    if w.leaves > 1 and rows <= MOST_SPLIT_ROWS:
        return run_split(x, w, out, tile, row_scales)
    grid = (triton.cdiv(rows, tile.block_t), triton.cdiv(columns, tile.block_n))
    _linear[grid](
        x,
        row_scales,
        w.weight,
        w.scale,
        w.bias,
        out,
        rows,
        columns,
        depth,
        depth // w.leaves,
        BT=tile.block_t,
        BN=tile.block_n,
        BK=tile.block_k,
        EVEN_K=depth // w.leaves % tile.block_k == 0,
        LEAVES=w.leaves,
        HAS_BIAS=w.bias is not None,
        HAS_SCALE=w.scale is not None,
        HAS_ROW_SCALES=row_scales is not None,
        PROMOTED=PROMOTED if row_scales is not None else 0,
        LINES=prefetched_lines(rows, w),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    return out


def run_library(x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """The linear layer by cuBLASLt as `configure` sets it; without bias, which it would round separately."""
    if out.dtype == x.dtype:
        return torch.mm(x, w.weight.t(), out=out)
    return torch.mm(x, w.weight.t(), out_dtype=out.dtype, out=out)


def run_choice(
    x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, choice: Choice, row_scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear layer by one given choice; arguments as of `run_tile`."""
    if isinstance(choice, Library):
        return run_library(x, w, out)
    if isinstance(choice, Warps):
        assert row_scales is not None
        return run_warps(x, row_scales, w, out, choice)
    return run_tile(x, w, out, choice, row_scales)


def _choice(x: torch.Tensor, w: GpuLinearWeight) -> Choice:
    if x.dtype == torch.float32 and w.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return FLOAT32
    return choose(architecture(x.device), x.shape[0], w)


def linear(x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    values, row_scales = operands(x, w)
    return run_choice(values, w, out, _choice(x, w), row_scales)


def gated_linear(
    x: torch.Tensor,
    w: GpuLinearWeight,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    activation: Activation = Activation.SILU,
) -> torch.Tensor:
    """See the facade; `gate_up` is used where the two steps are not fused."""
    fused = choose_fused(architecture(x.device), x.shape[0], w.out_features // 2, w.excluded)
    if fused is None or w.bias is not None or w.scheme is not None or x.dtype == torch.float32:
        return activate_and_mul(linear(x, w, gate_up), out, activation)
    return run_fused_tile(x, w, out, fused, activation)


def run_fused_tile(
    x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, tile: Tile, activation: Activation = Activation.SILU
) -> torch.Tensor:
    """activation(x Wg^T) * (x Wu^T) by one given tile, which holds `block_n` features of each half."""
    rows, (columns, depth) = x.shape[0], w.weight.shape
    _gated_linear[(triton.cdiv(rows, tile.block_t), triton.cdiv(columns // 2, tile.block_n))](
        x,
        w.weight,
        out,
        rows,
        columns // 2,
        depth,
        BT=tile.block_t,
        BN=tile.block_n,
        BK=tile.block_k,
        EVEN_K=depth % tile.block_k == 0,
        ACTIVATION=activation.value,
        LINES=prefetched_lines(rows, w),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    return out
