"""What the warps of `gpu_prefill` do: a producer, which shares out the work and brings keys and values, and consumers.

# C consumers of 64 query rows each (token, then head of the group), 64 keys of a tile, D head dim
The producer brings tiles into rings of shared memory by the tensor memory accelerator, one block of the paged cache
each. A consumer asks for the scores of the next tile before it waits for the values of this one, so that the tensor
core works while it computes weights (Shah et al. 2024, arXiv 2407.08608). Tiles, operations on a row and their order
are those of `gpu_tiles`, and so are the bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sempre.kernels.attention.gpu_tiles import LOG2_E, LOWEST, find_request
from sempre.kernels.gpu_jit import gluon_jit

# query rows of a consumer, keys of a tile
ROWS = gl.constexpr(64)
TILE = gl.constexpr(64)
# items announced ahead
AHEAD = gl.constexpr(2)
# its name differs between releases of Triton
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon_jit()
def locate(
    item: Any,
    num_tiles: Any,
    starts: Any,
    lens: Any,
    num_requests: Any,
    KV_HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
) -> Any:
    """Head, request, its first row, rows and context, the item's first token, and its keys [begin, end).

    No keys: past the end, or a tile without rows. Requests of one row belong to another launch.
    """
    head = item % KV_HEADS
    index = gl.maximum(num_tiles - 1 - item // KV_HEADS, 0)
    r = find_request(starts, index, num_requests, TOKENS)
    row = gl.load(starts + r)
    count = gl.load(starts + r + 1) - row
    context = gl.load(lens + r)
    first = (index - row // TOKENS - r) * TOKENS
    first_position = context - count + first
    end = gl.minimum(first_position + TOKENS, context)
    begin = 0
    if WINDOW > 0:
        begin = gl.maximum(first_position - WINDOW + 1, 0) // 64 * 64
    if (first >= count) | (context < count) | (count == 1) | (item >= num_tiles * KV_HEADS):
        end = begin
    return head, r, row, count, context, first, begin, end


@gluon_jit()
def produce(
    k_desc: Any,
    v_desc: Any,
    tables: Any,
    starts: Any,
    lens: Any,
    counters: Any,
    k_ring: Any,
    v_ring: Any,
    items: Any,
    k_full: Any,
    k_empty: Any,
    v_full: Any,
    v_empty: Any,
    items_full: Any,
    items_empty: Any,
    num_tiles: Any,
    num_requests: Any,
    table_stride: Any,
    KV_HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Announces items, and brings the tiles of each."""
    BYTES: gl.constexpr = k_desc.block_type.nbytes
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_items = num_tiles * KV_HEADS
    item = gl.program_id(0)
    items.index(0).store(gl.full([1], 0, gl.int32, ONE) + item)
    mbarrier.arrive(items_full.index(0))
    turn = 0
    tile = 0
    while item < num_items:
        following = gl.atomic_add(counters, 1) + gl.num_programs(0)
        slot = (turn + 1) % AHEAD
        mbarrier.wait(items_empty.index(slot), ((turn + 1) // AHEAD & 1) ^ 1)
        items.index(slot).store(gl.full([1], 0, gl.int32, ONE) + following)
        mbarrier.arrive(items_full.index(slot))
        head, r, _row, _count, _context, _first, begin, end = locate(
            item, num_tiles, starts, lens, num_requests, KV_HEADS, TOKENS, WINDOW
        )
        table = tables + r.to(gl.int64) * table_stride
        for start in range(begin, end, 64):
            at = (gl.load(table + start // 64) * KV_HEADS + head) * 64
            stage = tile % STAGES
            phase = (tile // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BYTES)
            load_tile(k_desc, [at, 0], k_full.index(stage), k_ring.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BYTES)
            load_tile(v_desc, [at, 0], v_full.index(stage), v_ring.index(stage))
            tile += 1
        item = following
        turn += 1
    # the last program leaves the counters as it found them
    if gl.atomic_add(counters + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon_jit()
def announced(items: Any, items_full: Any, items_empty: Any, turn: Any) -> Any:
    """The item of a turn."""
    slot = turn % AHEAD
    mbarrier.wait(items_full.index(slot), turn // AHEAD & 1)
    item = gl.max(items.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
    mbarrier.arrive(items_empty.index(slot))
    return item


@gluon_jit()
def queries(
    qkv: Any,
    i: Any,
    head: Any,
    row: Any,
    count: Any,
    first: Any,
    KV_HEADS: gl.constexpr,
    KV_PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    TOKENS: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> Any:
    """Rows `i` of an item; zeros where there are none."""
    row_size = (KV_HEADS * GROUP + KV_PARTS * KV_HEADS) * DIM
    token = first + i // GROUP
    valid = (i // GROUP < TOKENS) & (token < count) & (token >= 0)
    d = gl.arange(0, triton.next_power_of_2(DIM), gl.SliceLayout(0, LAYOUT))
    at = (row + token).to(gl.int64) * row_size + (head * GROUP + i % GROUP) * DIM
    return gl.load(qkv + at[:, None] + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)


@gluon_jit()
def weigh(scores: Any, m: Any, key: Any, position: Any, scale_log2: Any, masked: Any, WINDOW: gl.constexpr) -> Any:
    """The new maximum, the weights of a tile of scores, and the factor of what came before."""
    if masked | (WINDOW > 0):
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    m_new = gl.maximum(m, gl.max(scores, axis=1) * scale_log2)
    none = gl.full_like(scores, 0.0)
    return m_new, gl.exp2(gl.fma(scores, none + scale_log2, none - m_new[:, None])), gl.exp2(m - m_new)


@gluon_jit()
def merge(m: Any, l: Any, acc: Any, m_split: Any, l_split: Any, acc_split: Any) -> Any:  # noqa: E741
    """The state after one more split; merging an empty split changes nothing."""
    ROW: gl.constexpr = m.type.layout
    m_split = gl.convert_layout(m_split, ROW)
    # all columns hold the row's sum
    l_split = gl.convert_layout(gl.max(l_split, axis=1), ROW)
    return next_state(m, l, acc, m_split, l_split, acc_split)


@gluon_jit()
def next_state(m: Any, l: Any, acc: Any, m_split: Any, l_split: Any, acc_split: Any) -> Any:  # noqa: E741
    """`merge` of a split whose state has the layouts of the one before it."""
    m_new = gl.maximum(m, m_split)
    old = gl.exp2(m - m_new)
    new = gl.exp2(m_split - m_new)
    l = gl.fma(l, old, l_split * new)  # noqa: E741
    acc = gl.fma(acc, old[:, None] + gl.full_like(acc, 0.0), acc_split * new[:, None])
    return m_new, l, acc


@gluon_jit()
def clear_unwritten(values: Any, low: Any, context: Any) -> None:
    """Zeros for the rows of a tile from key `context` on. All consumers write them, and the same."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for j in gl.static_range(4):
        part = values.slice(j * 16, 16)
        key = low + j * 16 + gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
        x = part.load(LAYOUT)
        part.store(gl.where((key < context)[:, None], x, gl.full_like(x, 0.0)))
    fence_async_shared()


@gluon_jit()
def consume(
    C: gl.constexpr,
    qkv: Any,
    starts: Any,
    lens: Any,
    sinks: Any,
    out: Any,
    q_smem: Any,
    ones: Any,
    k_ring: Any,
    v_ring: Any,
    items: Any,
    k_full: Any,
    k_empty: Any,
    v_full: Any,
    v_empty: Any,
    items_full: Any,
    items_empty: Any,
    num_tiles: Any,
    num_requests: Any,
    scale_log2: Any,
    KV_HEADS: gl.constexpr,
    KV_PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_DIM: gl.constexpr,
    TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Computes rows [64 C, 64 C + 64) of every item announced."""
    dtype: gl.constexpr = q_smem.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_DIM, 16])
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    P_OF_A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    P_OF_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DIM, BLOCK_DIM // 8], [4, 1], [1, 0])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    A_ROW: gl.constexpr = gl.SliceLayout(1, A)
    n = gl.arange(0, TILE, gl.SliceLayout(0, S))
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, A))
    i_q = C * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    i_s = C * ROWS + gl.arange(0, ROWS, S_ROW)
    i = C * ROWS + gl.arange(0, ROWS, A_ROW)
    q_own = q_smem.index(C)
    no_scores = gl.zeros([ROWS, TILE], gl.float32, S)
    num_items = num_tiles * KV_HEADS
    tile = 0
    turn = 0
    item = announced(items, items_full, items_empty, turn)
    head, _r, row, count, context, first, begin, end = locate(
        item, num_tiles, starts, lens, num_requests, KV_HEADS, TOKENS, WINDOW
    )
    q = queries(qkv, i_q, head, row, count, first, KV_HEADS, KV_PARTS, GROUP, DIM, TOKENS, Q)
    while item < num_items:
        m_all = gl.full([ROWS], LOWEST, gl.float32, A_ROW)
        l_all = gl.zeros([ROWS], gl.float32, A_ROW)
        acc_all = gl.zeros([ROWS, BLOCK_DIM], gl.float32, A)
        if end > begin:
            q_own.store(q)
            fence_async_shared()
            first_position = context - count + first
            position = first_position + i_s // GROUP
            if HAS_SINKS:
                m_all = gl.load(sinks + head * GROUP + i % GROUP) * LOG2_E
                l_all = gl.full([ROWS], 1.0, gl.float32, A_ROW)
            m = gl.full([ROWS], LOWEST, gl.float32, S_ROW)
            acc = gl.zeros([ROWS, BLOCK_DIM], gl.float32, A)
            l = gl.zeros([ROWS, 8], gl.float32, L)  # noqa: E741
            stage = tile % STAGES
            phase = tile // STAGES & 1
            mbarrier.wait(k_full.index(stage), phase)
            scores = warpgroup_mma(q_own, k_ring.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(stage))
            m, p, alpha = weigh(scores, m, begin + n, position, scale_log2, begin + 63 > first_position, WINDOW)
            for start in range(begin + 64, end, 64):
                weights = p.to(dtype)
                following = (tile + 1) % STAGES
                next_phase = (tile + 1) // STAGES & 1
                mbarrier.wait(k_full.index(following), next_phase)
                scores = warpgroup_mma(
                    q_own, k_ring.index(following).permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(stage), phase)
                acc_sum = warpgroup_mma(gl.convert_layout(weights, P_OF_A), v_ring.index(stage), acc, is_async=True)
                l_sum = warpgroup_mma(gl.convert_layout(weights, P_OF_L), ones, l, is_async=True)
                scores = warpgroup_mma_wait(2, deps=[scores])
                mbarrier.arrive(k_empty.index(following))
                m_split = m
                if start % SPLIT == 0:
                    m = gl.full([ROWS], LOWEST, gl.float32, S_ROW)
                m, p, alpha = weigh(scores, m, start + n, position, scale_log2, start + 63 > first_position, WINDOW)
                # two waits, with other operands: one that both branches share would be moved in front of the weights
                if start % SPLIT == 0:
                    acc, l, p = warpgroup_mma_wait(0, deps=[acc_sum, l_sum, p])  # noqa: E741
                    m_all, l_all, acc_all = merge(m_all, l_all, acc_all, m_split, l, acc)
                    acc = gl.zeros([ROWS, BLOCK_DIM], gl.float32, A)
                    l = gl.zeros([ROWS, 8], gl.float32, L)  # noqa: E741
                else:
                    acc, l = warpgroup_mma_wait(0, deps=[acc_sum, l_sum])  # noqa: E741
                    acc = acc * gl.convert_layout(alpha, A_ROW)[:, None]
                    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, L))[:, None]  # noqa: E741
                mbarrier.arrive(v_empty.index(stage))
                tile += 1
                stage = following
                phase = next_phase
            mbarrier.wait(v_full.index(stage), phase)
            last = (end - 1) // 64 * 64
            if last + 64 > context:
                clear_unwritten(v_ring.index(stage), last, context)
            weights = p.to(dtype)
            acc_sum = warpgroup_mma(gl.convert_layout(weights, P_OF_A), v_ring.index(stage), acc, is_async=True)
            l_sum = warpgroup_mma(gl.convert_layout(weights, P_OF_L), ones, l, is_async=True)
            acc, l = warpgroup_mma_wait(0, deps=[acc_sum, l_sum])  # noqa: E741
            mbarrier.arrive(v_empty.index(stage))
            tile += 1
            m_all, l_all, acc_all = merge(m_all, l_all, acc_all, m, l, acc)
        token = first + i // GROUP
        valid = (i // GROUP < TOKENS) & (token < count) & (end > begin)
        at = ((row + token).to(gl.int64) * (KV_HEADS * GROUP) + head * GROUP + i % GROUP) * DIM
        turn += 1
        # the next item's queries come while this one's outputs go
        item = announced(items, items_full, items_empty, turn)
        head, _r, row, count, context, first, begin, end = locate(
            item, num_tiles, starts, lens, num_requests, KV_HEADS, TOKENS, WINDOW
        )
        q = queries(qkv, i_q, head, row, count, first, KV_HEADS, KV_PARTS, GROUP, DIM, TOKENS, Q)
        result = (acc_all / l_all[:, None]).to(dtype)
        gl.store(out + at[:, None] + d[None, :], result, mask=valid[:, None] & (d < DIM)[None, :])
