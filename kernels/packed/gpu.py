"""GPU linear layers of packed weights. T rows, N out, K in.

For some rows the weight is widened in registers, tile by tile; for many it is widened once into scratch memory and
multiplied as any matrix (`kernels.linear.gpu`). As in every linear layer weights are the left operand; here the tensor
cores read it from registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, architecture, jit, prefetch, wait_for_previous, wait_for_tensor_cores
from sempre.kernels.linear import gpu as dense
from sempre.kernels.linear.gpu_tiles import LINE_BYTES, MOST_PREFETCHING_ROWS, PREFETCHED_BYTES, power_of_two
from sempre.kernels.linear.weights import GpuLinearWeight
from sempre.kernels.packed import PackedWeight
from sempre.kernels.packed.gpu_table import PackedChoice, PackedTile, Widened, choose
from sempre.kernels.packed.gpu_unpack import kind_of, unpacked

# of the kernel that widens: out features, and inputs of its tiles
_WIDENED_ROWS, _WIDENED_INPUTS = 32, 128


@jit()
def _loaded(
    words: Any,
    pairs: Any,
    block: Any,
    n: Any,
    start: Any,
    N: Any,
    K: Any,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
    EVEN_K: tl.constexpr,
) -> Any:
    """The tile of blocks `block` of 16 rows, which are rows n, and of BK inputs from `start` on."""
    WORDS: tl.constexpr = BK * BITS // 2
    GROUPS: tl.constexpr = BK // GROUP if BK > GROUP else 1
    of_row = K * BITS // 2
    i = tl.arange(0, WORDS)
    g = start // GROUP + tl.arange(0, GROUPS)
    at = words + block.to(tl.int64)[:, None] * of_row + start // BK * WORDS + i[None, :]
    pairs_at = pairs + g[:, None] * N + n[None, :]
    if EVEN_K:
        tile, scales = tl.load(at), tl.load(pairs_at)
    else:
        # numbers past the end are multiplied by zeros of x
        tile = tl.load(at, mask=(start // BK * WORDS + i < of_row)[None, :], other=0)
        scales = tl.load(pairs_at, mask=(g * GROUP < K)[:, None], other=0)
    return unpacked(tile, scales, BN, BK, GROUP, BITS, KIND, T)


@jit(runtime=("T",))
def _packed_linear(
    x: Any,
    words: Any,
    pairs: Any,
    bias: Any,
    out: Any,
    T: Any,
    N: Any,
    K: Any,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """acc[n, t] over ascending k of w[n, k] x[t, k], + bias[n] if there."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # blocks past the end repeat the last one and are not stored
    block = tl.minimum(tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16), N // 16 - 1)
    n_in = tl.minimum(n // 16, N // 16 - 1) * 16 + n % 16
    if LINES > 0:
        of_row = K * BITS // 2
        prefetch(words + block.to(tl.int64)[:, None] * of_row + (tl.arange(0, LINES) * 32)[None, :])
    wait_for_previous()
    dtype = x.dtype.element_ty
    k = tl.arange(0, BK)
    x_at = x + t.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros([BN, BT], tl.float32)
    for start in range(0, K, BK):
        tile = _loaded(words, pairs, block, n_in, start, N, K, BN, BK, GROUP, BITS, KIND, dtype, EVEN_K)
        # rows past the end are zeros, which need not be read
        inside = (t < T)[None, :] if EVEN_K else (t < T)[None, :] & (start + k < K)[:, None]
        acc = tl.dot(tile, tl.load(x_at, mask=inside, other=0.0), acc, input_precision="ieee")
        wait_for_tensor_cores()
        x_at += BK
    result = tl.trans(acc)
    if HAS_BIAS:
        result += tl.load(bias + n_in).to(tl.float32)[None, :]
    at = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@jit()
def _widen(
    words: Any,
    pairs: Any,
    out: Any,
    N: Any,
    K: Any,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    block = tl.minimum(tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16), N // 16 - 1)
    n_in = tl.minimum(n // 16, N // 16 - 1) * 16 + n % 16
    start = tl.program_id(0) * BK
    k = start + tl.arange(0, BK)
    wait_for_previous()
    dtype = out.dtype.element_ty
    tile = _loaded(words, pairs, block, n_in, start, N, K, BN, BK, GROUP, BITS, KIND, dtype, EVEN_K)
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], tile, mask=(n < N)[:, None] & (k < K)[None, :])


def widen(w: PackedWeight) -> torch.Tensor:
    """See the facade."""
    rows, depth = w.out_features, w.in_features
    out = torch.empty(rows, depth, dtype=w.dtype, device=w.words.device)
    _widen[(triton.cdiv(depth, _WIDENED_INPUTS), triton.cdiv(rows, _WIDENED_ROWS))](
        w.words,
        w.pairs,
        out,
        rows,
        depth,
        BN=_WIDENED_ROWS,
        BK=_WIDENED_INPUTS,
        EVEN_K=depth % _WIDENED_INPUTS == 0,
        GROUP=w.group,
        BITS=w.scheme.bits,
        KIND=kind_of(w),
        num_warps=4,
        **CHAINED,
    )
    return out


def dense_weight(w: PackedWeight) -> GpuLinearWeight:
    """The weight as any other, in scratch memory."""
    return GpuLinearWeight(widen(w), w.bias, excluded=w.excluded)


def _prefetched_lines(rows: int, w: PackedWeight) -> int:
    """Lines of each block of rows that a matmul of few rows prefetches before it waits for x; a power of two."""
    if rows > MOST_PREFETCHING_ROWS:
        return 0
    blocks, of_block = w.words.shape
    return power_of_two(min(of_block * 4 // LINE_BYTES, PREFETCHED_BYTES // (blocks * LINE_BYTES)))


def run_tile(x: torch.Tensor, w: PackedWeight, out: torch.Tensor, tile: PackedTile) -> torch.Tensor:
    """The linear layer by one given tile."""
    rows, columns, depth = x.shape[0], w.out_features, w.in_features
    _packed_linear[(triton.cdiv(rows, tile.block_t), triton.cdiv(columns, tile.block_n))](
        x,
        w.words,
        w.pairs,
        w.bias,
        out,
        rows,
        columns,
        depth,
        BT=tile.block_t,
        BN=tile.block_n,
        BK=tile.block_k,
        EVEN_K=depth % tile.block_k == 0,
        GROUP=w.group,
        BITS=w.scheme.bits,
        KIND=kind_of(w),
        HAS_BIAS=w.bias is not None,
        LINES=_prefetched_lines(rows, w),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    return out


def run_choice(x: torch.Tensor, w: PackedWeight, out: torch.Tensor, choice: PackedChoice) -> torch.Tensor:
    return dense.linear(x, dense_weight(w), out) if isinstance(choice, Widened) else run_tile(x, w, out, choice)


def linear(x: torch.Tensor, w: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    return run_choice(x, w, out, choose(architecture(x.device), x.shape[0], w))
