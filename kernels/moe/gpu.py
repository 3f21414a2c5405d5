"""GPU mixture of experts: linear layers of the experts, and the sum of their results, without waiting for the host.

# T rows, E experts, K experts a row, H width, I inner width of an expert, N out and D in features of a linear layer
A pair p < P = T K is row p // K with its expert of rank p % K (`gpu_dispatch`). A program of a matmul owns a tile of
one expert's pairs, which it reads and writes where they are; sums run as in every matmul (`kernels.linear.gpu`), so a
pair's bits do not depend on its tile. Grids depend on T alone, so that a captured graph serves any choice of experts;
programs beyond the actual tiles exit at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.activation import Activation
from sempre.kernels.activation.gpu import activated
from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.gpu_jit import CHAINED, architecture, jit, wait_for_previous
from sempre.kernels.linear.gpu_table import FLOAT32, PROMOTED, Tile, choose_expert_tile
from sempre.kernels.linear.gpu_tiles import accumulate
from sempre.kernels.moe.experts import ExpertScratch, ExpertShape, ExpertWeights, GatedExperts, SigmoidScores
from sempre.kernels.moe.gpu_dispatch import chunks_of, dispatch, most_tiles
from sempre.kernels.moe.gpu_scores import preferences, scale_weights, weigh

COMBINED = 1024


@jit(runtime=("max_tiles",))
def _expert_linear(
    x: Any,
    row_scales: Any,
    w: Any,
    scale: Any,
    bias: Any,
    order: Any,
    tiles: Any,
    out: Any,
    max_tiles: Any,
    N: Any,
    D: Any,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS_OF_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> None:
    """out[p] = w[expert of p] x[p // PAIRS_OF_ROW] (+ bias); ACTIVATION: None, or that of the first half of the rows of
    w, times the second; they alternate in a tile, and each half is rounded as the unfused matmul would store it."""
    wait_for_previous()
    tile = tl.program_id(1)
    expert = tl.load(tiles + tile).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(tiles + max_tiles + tile) + tl.arange(0, BT)
    end = tl.load(tiles + 2 * max_tiles + tile)
    # places past the end repeat the last one and are not stored
    pair = tl.load(order + tl.minimum(place, end - 1))
    row = pair // PAIRS_OF_ROW
    local = tl.arange(0, BN)
    if ACTIVATION is not None:
        width = N // 2
        n = tl.minimum(tl.program_id(0) * (BN // 2) + local // 2, width - 1) + local % 2 * width
    else:
        width = N
        n = tl.minimum(tl.program_id(0) * BN + local, N - 1)
    acc = accumulate(w + expert * N * D, x, n, row, D, BN, BT, BK, EVEN_K, PROMOTED)
    if HAS_ROW_SCALES:
        acc *= tl.load(row_scales + row)[None, :]
    if HAS_SCALE:
        acc *= tl.load(scale + expert * N + n)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + expert * N + n).to(tl.float32)[:, None]
    dtype = out.dtype.element_ty
    if ACTIVATION is not None:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // 2, 2, BT]), [0, 2, 1]))
        value = activated(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), ACTIVATION)
        column = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    else:
        value = acc
        column = tl.program_id(0) * BN + local
    at = out + pair.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, tl.trans(value).to(dtype), mask=(place < end)[:, None] & (column < width)[None, :])


@jit(runtime=("width",))
def _combine(parts: Any, weights: Any, out: Any, width: Any, K: tl.constexpr, BLOCK: tl.constexpr) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = parts + row * K * width + h
    total = tl.load(weights + row * K) * tl.load(at, mask=h < width, other=0.0)
    for k in range(1, K):
        total += tl.load(weights + row * K + k) * tl.load(at + k * width, mask=h < width, other=0.0)
    tl.store(out + row * width + h, total, mask=h < width)


def expert_scratch(
    allocate: Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor],
    shape: ExpertShape,
    max_rows: int,
    dtype: torch.dtype,
) -> ExpertScratch:
    """See the facade."""
    pairs = max_rows * shape.experts_per_row
    # no step has more chunks than one with the most rows
    counts = chunks_of(max_rows, shape.num_experts, shape.experts_per_row).number * shape.num_experts
    integers = torch.int32
    return ExpertScratch(
        allocate("chosen experts", (max_rows, shape.experts_per_row), integers),
        allocate("expert weights", (max_rows, shape.experts_per_row), torch.float32),
        allocate("expert counts", (counts,), integers),
        allocate("expert order", (pairs,), integers),
        allocate("expert tiles", (3 * most_tiles(pairs, shape.num_experts, 1),), integers),
        allocate("expert activated", (pairs, shape.intermediate_size), dtype),
        allocate("expert parts", (pairs, shape.hidden_size), torch.float32),
    )


def run_experts(
    x: torch.Tensor,
    w: ExpertWeights,
    scratch: ExpertScratch,
    out: torch.Tensor,
    tile: Tile,
    activation: Activation | None = None,
) -> torch.Tensor:
    """The linear layer for pairs sorted for this tile; x [T, D], or [P, D] after a first layer, → out [P, N], or with
    an activation [P, N / 2]."""
    num_pairs = out.shape[0]
    num_experts, columns, depth = w.weight.shape
    values, row_scales = quantize_rows(x) if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS else (x, None)
    tiles = most_tiles(num_pairs, num_experts, tile.block_t)
    _expert_linear[(triton.cdiv(columns, tile.block_n), tiles)](
        values,
        row_scales,
        w.weight,
        w.scale,
        w.bias,
        scratch.order,
        scratch.tiles,
        out,
        tiles,
        columns,
        depth,
        BT=tile.block_t,
        BN=tile.block_n,
        BK=tile.block_k,
        EVEN_K=depth % tile.block_k == 0,
        PAIRS_OF_ROW=num_pairs // x.shape[0],
        ACTIVATION=activation.value if activation is not None else None,
        HAS_BIAS=w.bias is not None,
        HAS_SCALE=w.scale is not None,
        HAS_ROW_SCALES=row_scales is not None,
        PROMOTED=PROMOTED if row_scales is not None else 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    return out


def run_gated(
    x: torch.Tensor, experts: GatedExperts, scratch: ExpertScratch, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns activated [P, I] and parts float32 [P, H] of x [T, H], dispatched for this tile."""
    num_pairs = x.shape[0] * scratch.experts.shape[1]
    inner = run_experts(x, experts.gate_up, scratch, scratch.activated[:num_pairs], tile, experts.activation)
    return inner, run_experts(inner, experts.down, scratch, scratch.parts[:num_pairs], tile)


def combine(parts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """parts float32 [T, K, H], weights float32 [T, K] → out [T, H], in float32 and rank order, rounded once."""
    rows, num_chosen, width = parts.shape
    grid = (rows, triton.cdiv(width, COMBINED))
    _combine[grid](parts, weights, out, width, K=num_chosen, BLOCK=COMBINED, num_warps=4, **CHAINED)
    return out


def expert_tile(dtype: torch.dtype, num_pairs: int, w: ExpertWeights) -> Tile:
    """The tile for the average number of pairs per expert."""
    if dtype == torch.float32 and w.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return FLOAT32
    return choose_expert_tile(architecture(w.weight.device), triton.cdiv(num_pairs, w.num_experts), w.scheme)


def sparse_mlp(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: GatedExperts,
    scratch: ExpertScratch,
    out: torch.Tensor,
    *,
    renormalize: bool,
    scores: SigmoidScores | None = None,
) -> torch.Tensor:
    """See the facade."""
    rows = x.shape[0]
    tile = expert_tile(x.dtype, rows * scratch.experts.shape[1], experts.gate_up)
    if scores is None:
        dispatch(logits, scratch, tile.block_t, renormalize=renormalize)
    else:
        dispatch(preferences(logits, scores), scratch, tile.block_t, renormalize=renormalize)
        weigh(logits, scratch, scores, renormalize=renormalize)
    if experts.factors is not None:
        scale_weights(scratch, rows, experts.factors)
    _, parts = run_gated(x, experts, scratch, tile)
    return combine(parts.view(rows, -1, out.shape[1]), scratch.weights[:rows], out)
