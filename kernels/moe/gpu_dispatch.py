"""GPU router and sort of a mixture of experts: one launch for a few rows, two for more.

# T rows, E experts, K experts a row, P = T K pairs of a row and one of its experts
Weights are exponentials divided by a sum of integers, floor(exp * 2**40), which is the same in any order. Pair p is row
p // K with its expert of rank p % K. Pairs are sorted by (expert, pair): a counting sort, whose result is unique. A
program has a chunk of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.moe.experts import ExpertScratch
from sempre.kernels.sampling.gpu_elementary import exp32, mass

# rows of a chunk when there are several, and of a single one
MOST_ROWS, LONE_ROWS = 16, (1, 4, 16)
# pairs of a chunk, which are compared with one another and with the experts
MOST_PAIRS = 128
COMPARED = 16_384
# no program has the registers for more comparisons
MOST_COMPARED = 1 << 16

_MASS_UNIT = tl.constexpr(2.0**-40)


@jit()
def _choose(
    logits: Any,
    row: Any,
    num_rows: Any,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
) -> Any:
    """Experts and weights [rows, BLOCK_K]: K times the greatest remaining logit, ties going to the lower expert.

    No weights for a row that is not finite. BLOCK_E means no expert: past K, and past the last row.
    """
    e = tl.arange(0, BLOCK_E)[None, :]
    rank = tl.arange(0, BLOCK_K)[None, :]
    inside = (row < num_rows)[:, None] & (e < E)
    x = tl.load(logits + row.to(tl.int64)[:, None] * E + e, mask=inside, other=0.0)
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1)[:, None] != 0
    x = tl.where(e < E, tl.where(finite, x, 0.0), float("-inf"))
    greatest = tl.max(x, axis=1)[:, None]
    all_masses = mass(x - greatest)
    chosen = tl.full([BLOCK_T, BLOCK_K], BLOCK_E, tl.int32)
    best = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    for k in range(K):
        value = tl.max(x, axis=1)[:, None]
        expert = tl.min(tl.where(x == value, e, BLOCK_E), axis=1)[:, None]
        chosen = tl.where(rank == k, expert, chosen)
        best = tl.where(rank == k, value, best)
        x = tl.where(e == expert, float("-inf"), x)
    masses = mass(best - greatest) if RENORMALIZE else all_masses
    total = tl.sum(masses, axis=1).to(tl.float32) * _MASS_UNIT
    weight = tl.div_rn(exp32(best - greatest), tl.zeros_like(best) + total[:, None])
    return tl.where((row < num_rows)[:, None], chosen, BLOCK_E), tl.where(finite, weight, float("nan"))


@jit()
def _store_choice(
    experts: Any,
    weights: Any,
    row: Any,
    chosen: Any,
    weight: Any,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    at = row.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(experts + at, chosen, mask=chosen < BLOCK_E)
    tl.store(weights + at, weight, mask=chosen < BLOCK_E)


@jit()
def _count(expert: Any, BLOCK_E: tl.constexpr) -> Any:
    """Pairs of each expert [BLOCK_E] among those of `expert`, a vector."""
    ids = tl.arange(0, BLOCK_E)
    return tl.sum((expert[:, None] == ids[None, :]).to(tl.int32), axis=0)


@jit(runtime=("num_rows",))
def _route(
    logits: Any,
    experts: Any,
    weights: Any,
    counts: Any,
    num_rows: Any,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
) -> None:
    """counts[c, e]: pairs of expert e in chunk c."""
    wait_for_previous()
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    chosen, weight = _choose(logits, row, num_rows, E, K, BLOCK_T, BLOCK_E, BLOCK_K, RENORMALIZE)
    _store_choice(experts, weights, row, chosen, weight, K, BLOCK_E, BLOCK_K)
    ids = tl.arange(0, BLOCK_E)
    count = _count(tl.reshape(chosen, [BLOCK_T * BLOCK_K]), BLOCK_E)
    tl.store(counts + tl.program_id(0) * E + ids, count, mask=ids < E)


@jit(runtime=("num_rows", "rows_of_tile", "max_tiles"))
def _sort_pairs(
    logits: Any,
    experts: Any,
    weights: Any,
    counts: Any,
    order: Any,
    tiles: Any,
    num_rows: Any,
    rows_of_tile: Any,
    max_tiles: Any,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LONE: tl.constexpr,
) -> None:
    """order[i]: the pair at place i. tiles[0, j], [1, j], [2, j]: expert of tile j or -1, its first place, and the
    place after the last of its expert. LONE: there is one chunk, whose rows are routed here."""
    wait_for_previous()
    chunk = tl.program_id(0)
    ids = tl.arange(0, BLOCK_E)
    row = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_K)
    pairs = row[:, None] * K + rank[None, :]
    before = tl.zeros([BLOCK_E], tl.int32)
    if LONE:
        chosen, weight = _choose(logits, row, num_rows, E, K, BLOCK_T, BLOCK_E, BLOCK_K, RENORMALIZE)
        _store_choice(experts, weights, row, chosen, weight, K, BLOCK_E, BLOCK_K)
        expert = tl.reshape(chosen, [BLOCK_T * BLOCK_K])
        total = _count(expert, BLOCK_E)
    else:
        chosen = tl.load(experts + pairs, mask=(row < num_rows)[:, None] & (rank < K)[None, :], other=BLOCK_E)
        expert = tl.reshape(chosen, [BLOCK_T * BLOCK_K])
        total = tl.zeros([BLOCK_E], tl.int32)
        for first in range(0, tl.num_programs(0), BLOCK):
            c = first + tl.arange(0, BLOCK)
            there = (c < tl.num_programs(0))[:, None] & (ids < E)[None, :]
            part = tl.load(counts + c[:, None] * E + ids[None, :], mask=there, other=0)
            total += tl.sum(part, axis=0)
            before += tl.sum(tl.where((c < chunk)[:, None], part, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    place = ends - total + before
    local = tl.arange(0, BLOCK_T * BLOCK_K)
    earlier = (expert[None, :] == expert[:, None]) & (local[None, :] < local[:, None])
    at = tl.sum(earlier.to(tl.int32), axis=1)
    at += tl.sum(tl.where(expert[:, None] == ids[None, :], place[None, :], 0), axis=1)
    tl.store(order + at, tl.reshape(pairs, [BLOCK_T * BLOCK_K]), mask=expert < BLOCK_E)
    tile_counts = (total + rows_of_tile - 1) // rows_of_tile
    tile_ends = tl.cumsum(tile_counts, axis=0)
    # each expert's tiles, one of each at a time, and the rest
    for i in range(chunk, tl.max(tile_counts, axis=0), tl.num_programs(0)):
        j = tile_ends - tile_counts + i
        has = i < tile_counts
        tl.store(tiles + j, ids, mask=has)
        tl.store(tiles + max_tiles + j, ends - total + i * rows_of_tile, mask=has)
        tl.store(tiles + 2 * max_tiles + j, ends, mask=has)
    used = tl.max(tile_ends, axis=0)
    for first in range(used + chunk * BLOCK_E, max_tiles, tl.num_programs(0) * BLOCK_E):
        tl.store(tiles + first + ids, tl.full([BLOCK_E], -1, tl.int32), mask=first + ids < max_tiles)


class Chunks(NamedTuple):
    """How rows are divided; does not affect the result."""

    rows: int
    number: int


def chunks_of(num_rows: int, num_experts: int, experts_per_row: int) -> Chunks:
    """For a step of `num_rows` rows. ValueError for more experts, or more of them per row, than the kernels support."""
    block_e, block_k = triton.next_power_of_2(num_experts), triton.next_power_of_2(experts_per_row)
    if block_e * block_k > MOST_COMPARED:
        raise ValueError(
            f"expected at most {MOST_COMPARED // block_e} of {num_experts} experts a row on a GPU, found"
            f" {experts_per_row}"
        )
    fitting = min(MOST_PAIRS // block_k, COMPARED // (block_e * block_k), MOST_ROWS)
    most = 1 << max(fitting, 1).bit_length() - 1
    rows = next((rows for rows in LONE_ROWS if num_rows <= rows <= most), most)
    return Chunks(rows, triton.cdiv(num_rows, rows))


def most_tiles(num_pairs: int, num_experts: int, rows_of_tile: int) -> int:
    """The most tiles that pairs can form, whatever experts they choose."""
    return min(num_pairs, num_experts + num_pairs // rows_of_tile)


def dispatch(logits: torch.Tensor, scratch: ExpertScratch, rows_of_tile: int, *, renormalize: bool) -> None:
    """Route logits float32 [T, E], and sort their pairs for tiles of `rows_of_tile`: fills all integers of the scratch,
    and its `weights`."""
    num_rows, num_experts = logits.shape
    experts_per_row = scratch.experts.shape[1]
    chunks = chunks_of(num_rows, num_experts, experts_per_row)
    block_e = triton.next_power_of_2(num_experts)
    shape: dict[str, Any] = {
        "E": num_experts,
        "K": experts_per_row,
        "BLOCK_T": chunks.rows,
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(experts_per_row),
        "RENORMALIZE": renormalize,
        "num_warps": 8 if chunks.rows == MOST_ROWS else 4,
    }
    choice = (logits, scratch.experts, scratch.weights, scratch.counts)
    if chunks.number > 1:
        _route[(chunks.number,)](*choice, num_rows, **shape, **CHAINED)
    _sort_pairs[(chunks.number,)](
        *choice,
        scratch.order,
        scratch.tiles,
        num_rows,
        rows_of_tile,
        most_tiles(num_rows * experts_per_row, num_experts, rows_of_tile),
        BLOCK=max(1, min(64, COMPARED // block_e)),
        LONE=chunks.number == 1,
        **shape,
        **CHAINED,
    )
