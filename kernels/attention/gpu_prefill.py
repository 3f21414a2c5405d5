"""Attention of prompts on Hopper: persistent programs of one producer warp and two or three consumer warpgroups.

Programs stay for the whole launch; whichever is free takes the next item, a tile of queries and a key head, those of a
request with the most keys first. Who computes a tile, and when, is all that differs from `gpu_tiles`: bits are equal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sempre.kernels.attention.contract import AttentionWorkspace, HeadLayout, KvCache, PagedBatch, ScoreParams
from sempre.kernels.attention.gpu_tiles import SPLIT
from sempre.kernels.attention.gpu_warps import AHEAD, ROWS, TILE, consume, produce
from sempre.kernels.gpu_jit import EXACT, architecture, gluon_jit

# tiles of keys, and of values, on their way or in use
STAGES = 3
# with fewer keys, several smaller programs to a multiprocessor are as fast
LONG_CONTEXT = 512


@gluon_jit(runtime=("num_tiles", "num_requests", "table_stride"))
def attend(
    k_desc: Any,
    v_desc: Any,
    qkv: Any,
    tables: Any,
    starts: Any,
    lens: Any,
    sinks: Any,
    out: Any,
    counters: Any,
    num_tiles: Any,
    num_requests: Any,
    table_stride: Any,
    scale_log2: Any,
    KV_HEADS: gl.constexpr,
    KV_PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    WINDOW: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
) -> None:
    BLOCK_DIM: gl.constexpr = triton.next_power_of_2(DIM)
    TOKENS: gl.constexpr = CONSUMERS * ROWS // GROUP
    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_DIM], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BLOCK_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BLOCK_DIM], v_desc.layout)
    # a row's weights times a column of ones are its sum, in the tensor core's steps
    ones_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)
    ones = gl.allocate_shared_memory(dtype, [TILE, 8], ones_layout)
    ones.store(gl.full([TILE, 8], 1.0, dtype, gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])))
    fence_async_shared()
    items = gl.allocate_shared_memory(gl.int32, [AHEAD, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    items_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    items_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(AHEAD):
        mbarrier.init(items_full.index(slot), count=1)
        mbarrier.init(items_empty.index(slot), count=CONSUMERS)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, qkv, starts, lens, sinks, out, q_smem, ones, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, scale_log2, KV_HEADS, KV_PARTS,
                 GROUP, DIM, BLOCK_DIM, TOKENS, WINDOW, SPLIT, HAS_SINKS, STAGES)),
                (consume, (1, qkv, starts, lens, sinks, out, q_smem, ones, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, scale_log2, KV_HEADS, KV_PARTS,
                 GROUP, DIM, BLOCK_DIM, TOKENS, WINDOW, SPLIT, HAS_SINKS, STAGES)),
                (produce, (k_desc, v_desc, tables, starts, lens, counters, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, table_stride, KV_HEADS, TOKENS,
                 WINDOW, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, qkv, starts, lens, sinks, out, q_smem, ones, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, scale_log2, KV_HEADS, KV_PARTS,
                 GROUP, DIM, BLOCK_DIM, TOKENS, WINDOW, SPLIT, HAS_SINKS, STAGES)),
                (consume, (1, qkv, starts, lens, sinks, out, q_smem, ones, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, scale_log2, KV_HEADS, KV_PARTS,
                 GROUP, DIM, BLOCK_DIM, TOKENS, WINDOW, SPLIT, HAS_SINKS, STAGES)),
                (consume, (2, qkv, starts, lens, sinks, out, q_smem, ones, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, scale_log2, KV_HEADS, KV_PARTS,
                 GROUP, DIM, BLOCK_DIM, TOKENS, WINDOW, SPLIT, HAS_SINKS, STAGES)),
                (produce, (k_desc, v_desc, tables, starts, lens, counters, k_ring, v_ring, items, k_full, k_empty,
                 v_full, v_empty, items_full, items_empty, num_tiles, num_requests, table_stride, KV_HEADS, TOKENS,
                 WINDOW, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


def serves(qkv: torch.Tensor, cache: KvCache, batch: PagedBatch, heads: HeadLayout, scores: ScoreParams) -> bool:
    """Whether this kernel can compute the requests of more than one row, and is as fast or faster there."""
    narrow = heads.head_dim <= 128 and heads.group <= 64 and cache.k.shape[2] == 64
    if qkv.dtype == torch.float32 or not narrow or scores.soft_cap or architecture(qkv.device) != "sm_90":
        return False
    return batch.max_query_len * heads.group >= 128 and batch.max_context_len > LONG_CONTEXT


def paged_attention(
    qkv: torch.Tensor,
    cache: KvCache,
    batch: PagedBatch,
    heads: HeadLayout,
    scores: ScoreParams,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
) -> None:
    """The requests of more than one row; see the facade."""
    dtype = gl.bfloat16 if qkv.dtype == torch.bfloat16 else gl.float16
    block = [64, triton.next_power_of_2(heads.head_dim)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    tiles = (TensorDescriptor.from_tensor(t.view(-1, heads.head_dim), block, layout) for t in (cache.k, cache.v))
    # narrow heads leave registers for a third consumer
    consumers = 3 if heads.head_dim <= 64 else 2
    num_tiles = qkv.shape[0] // (64 * consumers // heads.group) + batch.num_requests
    programs = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    attend[(min(programs, num_tiles * heads.num_kv_heads),)](
        *tiles,
        qkv,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        scores.sinks,
        out,
        workspace.counters,
        num_tiles,
        batch.num_requests,
        batch.block_tables.stride(0),
        scores.scale * math.log2(math.e),
        KV_HEADS=heads.num_kv_heads,
        KV_PARTS=heads.kv_parts,
        GROUP=heads.group,
        DIM=heads.head_dim,
        WINDOW=scores.window or 0,
        SPLIT=SPLIT,
        HAS_SINKS=scores.sinks is not None,
        STAGES=STAGES,
        CONSUMERS=consumers,
        num_warps=4,
        **EXACT,
    )
