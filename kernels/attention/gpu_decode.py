"""Attention of single rows over long contexts on Hopper: one persistent grid for the splits of all requests.

# R requests of one row, G query heads that share a key head, D head dim
An item is a few splits of one request and key head; whichever program is free takes the next. Items of the whole size
come first, then what is left of each context, which is less. Whichever program finishes the last split of a request and
key head merges all of them, in ascending order. So who computes what is all that differs from `gpu_tiles`: bits are
equal.
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
from sempre.kernels.attention.gpu_split_warps import FIELDS, MAX_REQUESTS, consume, produce
from sempre.kernels.attention.gpu_tiles import SPLIT
from sempre.kernels.attention.gpu_warps import AHEAD, TILE
from sempre.kernels.gpu_jit import CHAINED, architecture, gluon_jit, wait_for_previous

# out of service: since its last repair, of a read before the first row, it has not run on a device. From 4,096 keys on
# it is as fast as one program for each request and key head, or faster
LONG_CONTEXT = 1 << 60
# programs that share a multiprocessor, and the registers of a thread when one starts
PROGRAMS, REGISTERS = 2, 128


@gluon_jit(runtime=("num_requests", "table_stride", "max_splits"))
def attend_splits(
    k_desc: Any,
    v_desc: Any,
    qkv: Any,
    tables: Any,
    starts: Any,
    lens: Any,
    sinks: Any,
    out: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    counters: Any,
    arrived: Any,
    num_requests: Any,
    table_stride: Any,
    max_splits: Any,
    scale_log2: Any,
    KV_HEADS: gl.constexpr,
    KV_PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    BLOCK_DIM: gl.constexpr = triton.next_power_of_2(DIM)
    dtype: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BLOCK_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BLOCK_DIM], v_desc.layout)
    # a row's weights times a column of ones are its sum, in the tensor core's steps
    ones_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)
    ones = gl.allocate_shared_memory(dtype, [TILE, 8], ones_layout)
    ones.store(gl.full([TILE, 8], 1.0, dtype, gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])))
    fence_async_shared()
    items = gl.allocate_shared_memory(gl.int32, [AHEAD, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    items_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    items_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(AHEAD):
        mbarrier.init(items_full.index(slot), count=1)
        mbarrier.init(items_empty.index(slot), count=1)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=1)
    wait_for_previous()
    gl.warp_specialize(
        [
            (consume, (qkv, starts, lens, sinks, out, part_acc, part_m, part_l, arrived, ones, k_ring, v_ring, items,
             k_full, k_empty, v_full, v_empty, items_full, items_empty, max_splits, scale_log2, KV_HEADS, KV_PARTS,
             GROUP, DIM, BLOCK_DIM, SPLIT, HAS_SINKS, STAGES)),
            (produce, (k_desc, v_desc, tables, starts, lens, counters, k_ring, v_ring, items, k_full, k_empty, v_full,
             v_empty, items_full, items_empty, num_requests, table_stride, KV_HEADS, SPLIT, STAGES)),
        ],
        [1],
        [56],
    )  # fmt: skip


def serves(
    qkv: torch.Tensor,
    cache: KvCache,
    batch: PagedBatch,
    heads: HeadLayout,
    scores: ScoreParams,
    workspace: AttentionWorkspace,
) -> bool:
    """Whether this kernel can compute the requests of one row, and is as fast or faster there."""
    narrow = heads.head_dim <= 128 and heads.group <= 16 and cache.k.shape[2] == 64
    if qkv.dtype == torch.float32 or not narrow or scores.soft_cap or scores.window:
        return False
    if batch.max_context_len <= LONG_CONTEXT or batch.num_requests > MAX_REQUESTS:
        return False
    splits = triton.cdiv(batch.max_context_len, SPLIT)
    return architecture(qkv.device) == "sm_90" and workspace.has_room_for(batch.num_requests, splits, heads)


def paged_attention(
    qkv: torch.Tensor,
    cache: KvCache,
    batch: PagedBatch,
    heads: HeadLayout,
    scores: ScoreParams,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
) -> None:
    """The requests of one row; see the facade."""
    dtype = gl.bfloat16 if qkv.dtype == torch.bfloat16 else gl.float16
    block_dim = triton.next_power_of_2(heads.head_dim)
    block = [64, block_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    tiles = (TensorDescriptor.from_tensor(t.view(-1, heads.head_dim), block, layout) for t in (cache.k, cache.v))
    splits = triton.cdiv(batch.max_context_len, SPLIT)
    programs = PROGRAMS * torch.cuda.get_device_properties(qkv.device).multi_processor_count
    attend_splits[(min(programs, batch.num_requests * splits * heads.num_kv_heads),)](
        *tiles,
        qkv,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        scores.sinks,
        out,
        workspace.acc,
        workspace.m,
        workspace.l,
        workspace.counters,
        workspace.arrived,
        batch.num_requests,
        batch.block_tables.stride(0),
        splits,
        scores.scale * math.log2(math.e),
        KV_HEADS=heads.num_kv_heads,
        KV_PARTS=heads.kv_parts,
        GROUP=heads.group,
        DIM=heads.head_dim,
        SPLIT=SPLIT,
        HAS_SINKS=scores.sinks is not None,
        STAGES=384 // block_dim if block_dim > 32 else 12,
        num_warps=4,
        maxnreg=REGISTERS,
        **CHAINED,
    )
