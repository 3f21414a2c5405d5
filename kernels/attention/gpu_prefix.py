"""GPU attention of a step whose decoding requests share leading splits of keys: these are read once for many rows.

# R requests, some of one row, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim
The first kernel computes partials of shared splits, one tile of a group's rows at a time; the second begins each
request with those, in ascending order, and goes on with the splits of its own. A partial depends on its keys and its
row alone and the merge has one order, so the bits are those of `gpu.paged_attention`. (The cascades of FlashInfer, Ye
et al. 2025, arXiv 2501.01005, merge in another order.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sempre.kernels.attention import gpu
from sempre.kernels.attention.contract import AttentionWorkspace, HeadLayout, KvCache, PagedBatch, ScoreParams
from sempre.kernels.attention.gpu_tiles import LOWEST, SPLIT, empty_state, merge, prefetch_tiles, walk_split, walk_tiles
from sempre.kernels.attention.shared_prefixes import TILE_REQUESTS, SharedPrefixes
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous


@jit(runtime=("table_stride", "max_splits"))
def _attend_shared(
    qkv: Any,
    keys: Any,
    values: Any,
    tables: Any,
    starts: Any,
    requests: Any,
    tiles: Any,
    num_tiles: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    table_stride: Any,
    max_splits: Any,
    scale_log2: Any,
    KV_HEADS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAP_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Programs [Hkv, parts of a tile, any number]: each takes tiles in turn."""
    head = tl.program_id(0)
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    member = tl.program_id(1) * TOKENS + i // GROUP
    query_head = head * GROUP + i % GROUP
    row_size = (KV_HEADS * GROUP + KV_PARTS * KV_HEADS) * DIM
    wait_for_previous()
    for index in range(tl.program_id(2), tl.load(num_tiles), tl.num_programs(2)):
        split = tl.load(tiles + 3 * index)
        first = tl.load(tiles + 3 * index + 1)
        count = tl.load(tiles + 3 * index + 2)
        if tl.program_id(1) * TOKENS < count:
            valid = (i // GROUP < TOKENS) & (member < count)
            r = tl.load(requests + first + member, mask=valid, other=0).to(tl.int64)
            row = tl.load(starts + r, mask=valid, other=0).to(tl.int64)
            in_dim = valid[:, None] & (d < DIM)[None, :]
            q_at = qkv + row[:, None] * row_size + query_head[:, None] * DIM + d[None, :]
            q = tl.load(q_at, mask=in_dim, other=0.0)
            table = tables + tl.load(requests + first).to(tl.int64) * table_stride
            m = tl.full([BLOCK_M], LOWEST, tl.float32)
            l = tl.zeros([BLOCK_M, 16], tl.float32)  # noqa: E741
            acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
            low = split * SPLIT
            m, l, acc = walk_tiles(  # noqa: E741
                q, m, l, acc, low, low + SPLIT, member, low + SPLIT, keys, values, table, head, scale_log2,
                KV_HEADS, DIM, BLOCK_DIM, BLOCK, 0, SOFT_CAP, CAP_SCALE, False,
            )  # fmt: skip
            at = (r * (KV_HEADS * GROUP) + query_head) * max_splits + split
            tl.store(part_acc + at[:, None] * DIM + d[None, :], acc, mask=in_dim)
            tl.store(part_m + at, m, mask=valid)
            tl.store(part_l + at, tl.max(l, axis=1), mask=valid)


@jit(runtime=("table_stride", "max_splits"))
def _attend_rest(
    qkv: Any,
    keys: Any,
    values: Any,
    tables: Any,
    starts: Any,
    lens: Any,
    counts: Any,
    sinks: Any,
    out: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    table_stride: Any,
    max_splits: Any,
    scale_log2: Any,
    KV_HEADS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAP_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARALLEL: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PREFETCH: tl.constexpr,
) -> None:
    """Programs [Hkv, R, splits side by side]: the query heads of one request's row that share a key head."""
    head, r = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts + r)
    count = tl.load(starts + r + 1) - row
    context = tl.load(lens + r)
    shared = tl.load(counts + r)
    table = tables + r.to(tl.int64) * table_stride
    if PREFETCH > 0:
        low = (shared + tl.program_id(2)) * SPLIT
        prefetch_tiles(context, low, keys, values, table, head, KV_HEADS, DIM, BLOCK, PREFETCH)
    wait_for_previous()
    # others belong to another launch; padding has no context
    if (count != 1) | (context < 1):
        return
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    valid = i < GROUP
    in_dim = valid[:, None] & (d < DIM)[None, :]
    query_head = head * GROUP + i % GROUP
    row_size = (KV_HEADS * GROUP + KV_PARTS * KV_HEADS) * DIM
    q_at = qkv + row.to(tl.int64) * row_size + query_head[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=in_dim, other=0.0)
    out_row = row.to(tl.int64) * (KV_HEADS * GROUP) + query_head
    part_row = r.to(tl.int64) * (KV_HEADS * GROUP) + query_head
    last = context - 1
    position = last + i * 0
    num_splits = (context + SPLIT - 1) // SPLIT
    if PARALLEL:
        for s in range(shared + tl.program_id(2), num_splits, tl.num_programs(2)):
            m, l, acc = walk_split(  # noqa: E741
                q, s * SPLIT, tl.minimum(context, s * SPLIT + SPLIT), last, position, context, keys, values, table,
                head, scale_log2, KV_HEADS, DIM, BLOCK_DIM, BLOCK, 0, SOFT_CAP, CAP_SCALE, BLOCK_M,
            )  # fmt: skip
            at = part_row * max_splits + s
            tl.store(part_acc + at[:, None] * DIM + d[None, :], acc, mask=in_dim)
            tl.store(part_m + at, m, mask=valid)
            tl.store(part_l + at, l, mask=valid)
    else:
        m, l, acc = empty_state(sinks, query_head, BLOCK_M, BLOCK_DIM, HAS_SINKS)  # noqa: E741
        for s in range(shared):
            at = part_row * max_splits + s
            m_split = tl.load(part_m + at, mask=valid, other=LOWEST)
            l_split = tl.load(part_l + at, mask=valid, other=0.0)
            acc_split = tl.load(part_acc + at[:, None] * DIM + d[None, :], mask=in_dim, other=0.0)
            m, l, acc = merge(m, l, acc, m_split, l_split, acc_split)  # noqa: E741
        for s in range(shared, num_splits):
            m_split, l_split, acc_split = walk_split(
                q, s * SPLIT, tl.minimum(context, s * SPLIT + SPLIT), last, position, context, keys, values, table,
                head, scale_log2, KV_HEADS, DIM, BLOCK_DIM, BLOCK, 0, SOFT_CAP, CAP_SCALE, BLOCK_M,
            )  # fmt: skip
            m, l, acc = merge(m, l, acc, m_split, l_split, acc_split)  # noqa: E741
        tl.store(out + out_row[:, None] * DIM + d[None, :], acc / l[:, None], mask=in_dim)


class _Step(NamedTuple):
    """What both kernels read of one layer's step."""

    qkv: torch.Tensor
    cache: KvCache
    batch: PagedBatch
    prefixes: SharedPrefixes
    heads: HeadLayout
    scores: ScoreParams
    partials: AttentionWorkspace

    def launch(self, rows: int, programs: int) -> gpu.Launch:
        """For `rows` query rows that share a key head."""
        group, block_size = self.heads.group, self.cache.k.shape[2]
        launch = gpu.launch_shape(rows, programs, block_size, self.heads.head_dim, self.qkv.dtype)
        if group > launch.block_m:
            launch = launch._replace(block_m=triton.next_power_of_2(group), num_stages=1)
        return launch

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.qkv, self.cache.k, self.cache.v, self.batch.block_tables, self.batch.query_starts

    @property
    def outputs_and_sizes(self) -> tuple[object, ...]:
        partials, scale = self.partials, 1.0 if self.scores.soft_cap else self.scores.scale
        sizes = (self.batch.block_tables.stride(0), partials.max_splits, scale * math.log2(math.e))
        return partials.acc, partials.m, partials.l, *sizes

    def constants(self, launch: gpu.Launch) -> dict[str, object]:
        heads, cap = self.heads, self.scores.soft_cap
        return {
            "KV_HEADS": heads.num_kv_heads,
            "KV_PARTS": heads.kv_parts,
            "GROUP": heads.group,
            "DIM": heads.head_dim,
            "BLOCK_DIM": triton.next_power_of_2(heads.head_dim),
            "BLOCK": self.cache.k.shape[2],
            "SOFT_CAP": cap or 0.0,
            "CAP_SCALE": self.scores.scale / cap if cap else 0.0,
            "SPLIT": SPLIT,
            "BLOCK_M": launch.block_m,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            **CHAINED,
        }


def can_share(batch: PagedBatch, heads: HeadLayout, scores: ScoreParams, workspace: AttentionWorkspace | None) -> bool:
    """Whether the batch has shared prefixes, this layer sees all keys, and the workspace holds the partials."""
    prefixes = batch.prefixes
    if prefixes is None or scores.window is not None or workspace is None:
        return False
    return workspace.has_room_for(batch.num_requests, prefixes.max_splits, heads)


def paged_attention(
    qkv: torch.Tensor,
    cache: KvCache,
    batch: PagedBatch,
    heads: HeadLayout,
    scores: ScoreParams,
    out: torch.Tensor,
    workspace: AttentionWorkspace | None,
) -> torch.Tensor:
    """As `gpu.paged_attention`, of a batch for which `can_share` holds."""
    assert batch.prefixes is not None
    assert workspace is not None
    inputs = gpu.Inputs(qkv, cache, batch, heads, scores, out, workspace)
    num_requests, max_splits = batch.num_requests, batch.prefixes.max_splits
    partials = _partials(workspace, num_requests, heads, max_splits)
    step = _Step(qkv, cache, batch, batch.prefixes, heads, scores, partials)
    _launch_shared(step)
    programs = num_requests * heads.num_kv_heads
    splits = triton.cdiv(batch.max_context_len, SPLIT)
    only_rows, parallel = batch.max_query_len == 1, 1
    # the workspace must have a place for each split, not only for shared ones; row r is then that of request r
    if only_rows and splits <= max_splits:
        parallel = max(1, min(splits, gpu.TARGET_PROGRAMS // programs))
    launch = step.launch(heads.group, programs)
    _attend_rest[(heads.num_kv_heads, num_requests, parallel)](
        *step.inputs,
        batch.context_lens,
        batch.prefixes.counts,
        scores.sinks,
        out,
        *step.outputs_and_sizes,
        PARALLEL=parallel > 1,
        HAS_SINKS=scores.sinks is not None,
        PREFETCH=gpu.prefetched_tiles(programs, cache.k.shape[2], heads.head_dim),
        **step.constants(launch),
    )
    if parallel > 1:
        plan = gpu.Plan(True, num_requests, parallel, gpu.PARALLEL, launch, partials)
        gpu.launch_merge(plan, partials, inputs)
    if not only_rows:
        gpu.attend(inputs, single_rows=False)
    return out


def _launch_shared(step: _Step) -> None:
    kv_heads, group, prefixes = step.heads.num_kv_heads, step.heads.group, step.prefixes
    launch = step.launch(TILE_REQUESTS * group, gpu.TARGET_PROGRAMS)
    parts = triton.cdiv(TILE_REQUESTS, launch.block_m // group)
    _attend_shared[(kv_heads, parts, triton.cdiv(gpu.TARGET_PROGRAMS, kv_heads * parts))](
        *step.inputs,
        prefixes.requests,
        prefixes.tiles,
        prefixes.num_tiles,
        *step.outputs_and_sizes,
        **step.constants(launch),
    )


def _partials(workspace: AttentionWorkspace, rows: int, heads: HeadLayout, splits: int) -> AttentionWorkspace:
    """The beginning of the workspace, for this many rows and splits."""
    shape = (rows, heads.num_heads, splits)
    count = math.prod(shape)
    return AttentionWorkspace(
        workspace.acc.view(-1)[: count * heads.head_dim].view(*shape, heads.head_dim),
        workspace.m.view(-1)[:count].view(shape),
        workspace.l.view(-1)[:count].view(shape),
        workspace.counters,
        workspace.arrived,
    )
