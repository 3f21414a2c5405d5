"""GPU products of fp8 weights: Triton tiles of one family per scheme. T rows, N out, K in.

Weight-only: the weight's tile is widened to x's dtype, exactly, and multiplied as a weight of that dtype would be.
Weights and activations: the fp8 tensor cores. Their own accumulator is narrower than float32, so every PROMOTED
elements of K, counted from 0, their sum is added to a float32 accumulator; the interval is the same in every tile, so
that it cannot be seen which one ran. The scales are applied to the float32 accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.gpu_jit import CHAINED, architecture, jit, wait_for_previous
from sempre.kernels.linear.gpu_loop import accumulate
from sempre.kernels.linear.gpu_table import FLOAT32, Tile
from sempre.kernels.linear.gpu_table_fp8 import FP8_TABLES, PROMOTED, WEIGHT_ONLY_TABLES, choose_fp8
from sempre.kernels.linear.weights import GpuLinear

# the first architecture with conversions and tensor cores for fp8
FIRST_CAPABILITY = (8, 9)


@jit(runtime=("T",))
def _linear_fp8(
    x: Any,
    row_scales: Any,
    w: Any,
    scale: Any,
    bias: Any,
    out: Any,
    T: Any,
    N: Any,
    K: Any,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> None:
    """acc[n, t] over ascending k of w[n, k] x[t, k], then * row_scales[t], * scale[n], + bias[n]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # rows past the end repeat the last one and are not stored
    n_in, t_in = tl.minimum(n, N - 1), tl.minimum(t, T - 1)
    wait_for_previous()
    acc = accumulate(w, x, n_in, t_in, K, BN, BT, BK, EVEN_K, PROMOTED if HAS_ROW_SCALES else 0)
    if HAS_ROW_SCALES:
        acc *= tl.load(row_scales + t_in)[None, :]
    acc *= tl.load(scale + n_in)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n_in).to(tl.float32)[:, None]
    at = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(acc).to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


def run_tile(
    x: torch.Tensor, row_scales: torch.Tensor | None, w: GpuLinear, out: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """The product by one given tile; x is fp8 with `row_scales` [T], or of another dtype without."""
    rows, (columns, depth) = x.shape[0], w.weight.shape
    _linear_fp8[(triton.cdiv(rows, tile.block_t), triton.cdiv(columns, tile.block_n))](
        x,
        row_scales,
        w.weight,
        w.scale,
        w.bias,
        out,
        rows,
        columns,
        depth,
        BT=tile.block_t,
        BN=tile.block_n,
        BK=tile.block_k,
        EVEN_K=depth % tile.block_k == 0,
        HAS_BIAS=w.bias is not None,
        HAS_ROW_SCALES=row_scales is not None,
        PROMOTED=PROMOTED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    return out


def choose_tile(arch: str, dtype: torch.dtype, rows: int, w: GpuLinear) -> Tile:
    """The tile for `rows` rows of x of `dtype`."""
    if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return choose_fp8(FP8_TABLES, arch, rows, w.out_features, w.in_features, w.excluded)
    if dtype == torch.float32:
        return FLOAT32
    return choose_fp8(WEIGHT_ONLY_TABLES, arch, rows, w.out_features, w.in_features, w.excluded)


def operands(x: torch.Tensor, w: GpuLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x as the product takes it, and its row scales."""
    return quantize_rows(x) if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS else (x, None)


def linear(x: torch.Tensor, w: GpuLinear, out: torch.Tensor) -> torch.Tensor:
    """x [T, K] times the fp8 weight into out [T, N], of x's dtype or float32; all contiguous. Returns `out`."""
    if not x.shape[0]:
        return out
    values, row_scales = operands(x, w)
    return run_tile(values, row_scales, w, out, choose_tile(architecture(x.device), x.dtype, x.shape[0], w))
