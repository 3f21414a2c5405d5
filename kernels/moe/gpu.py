"""GPU mixture of experts: router, sort, linear layers of the experts, combine; nothing waits for the host.

# T rows, E experts, K experts a row, H width, I inner width of an expert, N out and D in features of a linear layer
A pair p < P = T K is row p // K with its expert of rank p % K. Pairs are sorted by (expert, pair): a counting sort,
whose result is the only one of that order. A program of a matmul owns a tile of one expert's pairs, which it reads
and writes where they are; sums run as in every matmul (`kernels.linear.gpu`), so a pair's bits do not depend on its
tile. Grids follow from T alone, so that a captured graph serves any choice of experts; programs beyond the tiles that
there are end at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.activation.gpu import silu_times
from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.gpu_jit import CHAINED, architecture, jit, wait_for_previous
from sempre.kernels.linear.gpu import accumulate
from sempre.kernels.linear.gpu_table import FLOAT32, MANY_ROWS, PROMOTED, LinearShape, Tile, choose
from sempre.kernels.moe.experts import ExpertScratch, ExpertShape, ExpertWeights, GatedExperts
from sempre.kernels.sampling.gpu_elementary import exp32

# pairs that a program of the sort compares with one another, and with the experts
CHUNK, SMALL_CHUNK = 128, 32
# elements of the largest comparison
COMPARED = 16_384
COMBINED = 1024


@jit()
def _route(
    logits: Any,
    experts: Any,
    weights: Any,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
) -> None:
    """One row's experts: K times the greatest logit that is left, of equal ones the lower."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    rank = tl.arange(0, BLOCK_K)
    x = tl.load(logits + row * E + e, mask=e < E, other=0.0)
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=0)
    # of a row that is not finite, any experts, and no weights
    x = tl.where(finite != 0, x, 0.0)
    x = tl.where(e < E, x, float("-inf"))
    greatest = tl.max(x, axis=0)
    total = tl.sum(exp32(x - greatest), axis=0)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for k in range(K):
        value = tl.max(x, axis=0)
        expert = tl.min(tl.where(x == value, e, BLOCK_E), axis=0)
        chosen = tl.where(rank == k, expert, chosen)
        best = tl.where(rank == k, value, best)
        x = tl.where(e == expert, float("-inf"), x)
    weight = tl.div_rn(exp32(best - greatest), tl.zeros_like(best) + total)
    if RENORMALIZE:
        weight = tl.div_rn(weight, tl.zeros_like(best) + tl.sum(weight, axis=0))
    weight = tl.where(finite != 0, weight, float("nan"))
    tl.store(experts + row * K + rank, chosen, mask=rank < K)
    tl.store(weights + row * K + rank, weight, mask=rank < K)


@jit()
def _count_of_chunk(expert: Any, BLOCK_E: tl.constexpr) -> Any:
    """Pairs of each expert [BLOCK_E] among `expert` [CHUNK]; BLOCK_E stands for none."""
    ids = tl.arange(0, BLOCK_E)
    return tl.sum((expert[:, None] == ids[None, :]).to(tl.int32), axis=0)


@jit(runtime=("num_pairs",))
def _count_experts(
    experts: Any, counts: Any, num_pairs: Any, E: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    """counts[c, e]: pairs of expert e in chunk c."""
    wait_for_previous()
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=BLOCK_E)
    ids = tl.arange(0, BLOCK_E)
    tl.store(counts + chunk * E + ids, _count_of_chunk(expert, BLOCK_E), mask=ids < E)


@jit(runtime=("num_pairs", "num_chunks", "rows_of_tile", "max_tiles"))
def _sort_pairs(
    experts: Any,
    counts: Any,
    order: Any,
    tiles: Any,
    num_pairs: Any,
    num_chunks: Any,
    rows_of_tile: Any,
    max_tiles: Any,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
) -> None:
    """order[i]: the pair at place i. tiles[0, j], [1, j], [2, j]: expert of tile j or -1, its first place, and the
    place after the last of its expert."""
    wait_for_previous()
    chunk = tl.program_id(0)
    ids = tl.arange(0, BLOCK_E)
    local = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + local
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)
    if ONE_CHUNK:
        total = _count_of_chunk(expert, BLOCK_E)
    else:
        total = tl.zeros([BLOCK_E], tl.int32)
        for first in range(0, num_chunks, BLOCK):
            c = first + tl.arange(0, BLOCK)
            inside = (c < num_chunks)[:, None] & (ids < E)[None, :]
            part = tl.load(counts + c[:, None] * E + ids[None, :], mask=inside, other=0)
            total += tl.sum(part, axis=0)
            before += tl.sum(tl.where((c < chunk)[:, None], part, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    place = ends - total + before
    earlier = (expert[None, :] == expert[:, None]) & (local[None, :] < local[:, None])
    at = tl.sum(earlier.to(tl.int32), axis=1)
    at += tl.sum(tl.where(expert[:, None] == ids[None, :], place[None, :], 0), axis=1)
    tl.store(order + at, pair, mask=pair < num_pairs)
    tile_counts = (total + rows_of_tile - 1) // rows_of_tile
    tile_ends = tl.cumsum(tile_counts, axis=0)
    for first in range(chunk * BLOCK, max_tiles, tl.num_programs(0) * BLOCK):
        j = first + tl.arange(0, BLOCK)
        owner = tl.sum((tile_ends[None, :] <= j[:, None]).to(tl.int32), axis=1)
        own = ids[None, :] == owner[:, None]
        index = j - tl.sum(tl.where(own, (tile_ends - tile_counts)[None, :], 0), axis=1)
        start = tl.sum(tl.where(own, (ends - total)[None, :], 0), axis=1)
        inside = j < max_tiles
        tl.store(tiles + j, tl.where(owner < E, owner, -1), mask=inside)
        tl.store(tiles + max_tiles + j, start + index * rows_of_tile, mask=inside)
        tl.store(tiles + 2 * max_tiles + j, tl.sum(tl.where(own, ends[None, :], 0), axis=1), mask=inside)


@jit(runtime=("max_tiles",))
def _expert_linear(
    x: Any,
    row_scales: Any,
    w: Any,
    scale: Any,
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
    GATED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> None:
    """out[p] = w[expert of p] x[p // PAIRS_OF_ROW]; GATED: silu(first half) * second half, whose rows of w alternate in
    a tile, each half rounded as the unfused matmul would store it."""
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
    if GATED:
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
    dtype = out.dtype.element_ty
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // 2, 2, BT]), [0, 2, 1]))
        value = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32))
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


def route(
    logits: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into experts int32 [T, K] and weights float32 [T, K]; returns both."""
    rows, num_experts = logits.shape
    block = triton.next_power_of_2(num_experts)
    _route[(rows,)](
        logits,
        experts,
        weights,
        E=num_experts,
        K=experts.shape[1],
        BLOCK_E=block,
        BLOCK_K=triton.next_power_of_2(experts.shape[1]),
        RENORMALIZE=renormalize,
        num_warps=1 if block <= 512 else 4,
        **CHAINED,
    )
    return experts, weights


def most_tiles(num_pairs: int, num_experts: int, rows_of_tile: int) -> int:
    """Tiles that pairs make at most, however they choose."""
    return min(num_pairs, num_experts + num_pairs // rows_of_tile)


def chunk_sizes(num_pairs: int, num_experts: int) -> tuple[int, int]:
    """Pairs of a chunk of the sort, and chunks."""
    chunk = max(16, min(CHUNK, COMPARED // triton.next_power_of_2(num_experts)))
    chunk = min(chunk, SMALL_CHUNK) if num_pairs <= SMALL_CHUNK else chunk
    return chunk, triton.cdiv(num_pairs, chunk)


def most_counts(num_pairs: int, num_experts: int) -> int:
    """Elements of `counts` for at most so many pairs."""
    return chunk_sizes(num_pairs, num_experts)[1] * num_experts


def expert_scratch(
    allocate: Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor],
    shape: ExpertShape,
    max_rows: int,
    dtype: torch.dtype,
) -> ExpertScratch:
    """As the facade."""
    pairs = max_rows * shape.experts_per_row
    integers = torch.int32
    return ExpertScratch(
        allocate("chosen experts", (max_rows, shape.experts_per_row), integers),
        allocate("expert weights", (max_rows, shape.experts_per_row), torch.float32),
        allocate("expert counts", (most_counts(pairs, shape.num_experts),), integers),
        allocate("expert order", (pairs,), integers),
        allocate("expert tiles", (3 * most_tiles(pairs, shape.num_experts, 1),), integers),
        allocate("expert activated", (pairs, shape.intermediate_size), dtype),
        allocate("expert parts", (pairs, shape.hidden_size), torch.float32),
    )


def sort_pairs(experts: torch.Tensor, num_experts: int, scratch: ExpertScratch, rows_of_tile: int) -> int:
    """Fill `order` and `tiles` of the scratch, for tiles of so many pairs; returns how many tiles there are at most."""
    num_pairs = experts.numel()
    chunk, chunks = chunk_sizes(num_pairs, num_experts)
    block_e = triton.next_power_of_2(num_experts)
    tiles = most_tiles(num_pairs, num_experts, rows_of_tile)
    shape: dict[str, Any] = {"E": num_experts, "BLOCK_E": block_e, "CHUNK": chunk, "num_warps": 4}
    if chunks > 1:
        _count_experts[(chunks,)](experts, scratch.counts, num_pairs, **shape, **CHAINED)
    _sort_pairs[(chunks,)](
        experts,
        scratch.counts,
        scratch.order,
        scratch.tiles,
        num_pairs,
        chunks,
        rows_of_tile,
        tiles,
        BLOCK=max(1, min(64, COMPARED // block_e)),
        ONE_CHUNK=chunks == 1,
        **shape,
        **CHAINED,
    )
    return tiles


def run_experts(
    x: torch.Tensor, w: ExpertWeights, scratch: ExpertScratch, out: torch.Tensor, tile: Tile, *, gated: bool
) -> torch.Tensor:
    """The linear layer of pairs that were sorted for this tile; x [T, D], or [P, D] after a first one, → out [P, N]."""
    num_pairs = out.shape[0]
    num_experts, columns, depth = w.weight.shape
    values, row_scales = quantize_rows(x) if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS else (x, None)
    tiles = most_tiles(num_pairs, num_experts, tile.block_t)
    _expert_linear[(triton.cdiv(columns, tile.block_n), tiles)](
        values,
        row_scales,
        w.weight,
        w.scale,
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
        GATED=gated,
        HAS_SCALE=w.scale is not None,
        HAS_ROW_SCALES=row_scales is not None,
        PROMOTED=PROMOTED if row_scales is not None else 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **CHAINED,
    )
    return out


def run_gated(
    x: torch.Tensor, chosen: torch.Tensor, experts: GatedExperts, scratch: ExpertScratch, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x [T, H] and the experts `chosen` [T, K], by one given tile: activated [P, I], and parts float32 [P, H]."""
    num_pairs = chosen.numel()
    sort_pairs(chosen, experts.gate_up.num_experts, scratch, tile.block_t)
    activated = run_experts(x, experts.gate_up, scratch, scratch.activated[:num_pairs], tile, gated=True)
    return activated, run_experts(activated, experts.down, scratch, scratch.parts[:num_pairs], tile, gated=False)


def combine(parts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """parts float32 [T, K, H], weights float32 [T, K] → out [T, H], in float32 and rank order, rounded once."""
    rows, num_chosen, width = parts.shape
    grid = (rows, triton.cdiv(width, COMBINED))
    _combine[grid](parts, weights, out, width, K=num_chosen, BLOCK=COMBINED, num_warps=4, **CHAINED)
    return out


def expert_tile(dtype: torch.dtype, num_pairs: int, w: ExpertWeights) -> Tile:
    """That of an ordinary matmul with as many rows as an expert has on average, and all columns of experts in use."""
    if dtype == torch.float32 and w.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return FLOAT32
    num_experts, columns, depth = w.weight.shape
    together = LinearShape(columns * min(num_pairs, num_experts), depth, w.scheme)
    choice = choose(architecture(w.weight.device), triton.cdiv(num_pairs, num_experts), together)
    return choice if isinstance(choice, Tile) else MANY_ROWS


def sparse_mlp(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: GatedExperts,
    scratch: ExpertScratch,
    out: torch.Tensor,
    *,
    renormalize: bool,
) -> torch.Tensor:
    """As the facade."""
    rows = x.shape[0]
    chosen, weights = scratch.experts[:rows], scratch.weights[:rows]
    route(logits, chosen, weights, renormalize=renormalize)
    tile = expert_tile(x.dtype, chosen.numel(), experts.gate_up)
    _, parts = run_gated(x, chosen, experts, scratch, tile)
    return combine(parts.view(rows, -1, out.shape[1]), weights, out)
