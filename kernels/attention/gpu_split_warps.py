"""What the warps of `gpu_decode` do: a producer, which brings the keys and values of items, and a consumer warpgroup.

# R requests of one row, G query heads that share a key head, D head dim
A program's items follow one another in one ring of shared memory, so keys and values of the next item are on their way
while those of this one are used. A tensor-core instruction has 64 rows, of which G are: time goes into reading.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from sempre.kernels.attention.gpu_tiles import LOG2_E, LOWEST
from sempre.kernels.attention.gpu_warps import (
    AHEAD,
    ROWS,
    TILE,
    clear_unwritten,
    load_tile,
    next_state,
    queries,
    weigh,
)
from sempre.kernels.gpu_jit import gluon_jit

# requests of a step, at most
MAX_REQUESTS = 256
REQUESTS = gl.constexpr(MAX_REQUESTS)
# items of a program, about, and the most splits of one
ITEMS = gl.constexpr(4)
MOST_SPLITS = gl.constexpr(8)
# numbers of an item, a power of two
FIELDS = gl.constexpr(8)
# its name differs between releases of Triton
join_threads = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon_jit()
def _add(a: Any, b: Any) -> Any:
    return a + b


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
    num_requests: Any,
    table_stride: Any,
    KV_HEADS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Announces items, and brings the tiles of each. What it finds out about an item goes with it (`FIELDS`)."""
    BYTES: gl.constexpr = k_desc.block_type.nbytes
    MANY: gl.constexpr = gl.BlockedLayout([REQUESTS // 32], [32], [1], [0])
    programs = gl.num_programs(0)
    i = gl.arange(0, REQUESTS, MANY)
    inside = i < num_requests
    first_rows = gl.load(starts + i, mask=inside, other=0)
    single = gl.load(starts + i + 1, mask=inside, other=0) - first_rows == 1
    contexts = gl.where(single, gl.load(lens + i, mask=inside, other=0), 0)
    # an item has several splits where there are many
    whole_splits = gl.sum(contexts // SPLIT, axis=0) * KV_HEADS
    size = gl.minimum(gl.maximum(whole_splits // (programs * ITEMS), 1), MOST_SPLITS) * SPLIT
    # whole items of the requests up to and with each
    ends = gl.associative_scan(contexts // size, 0, _add)
    whole = gl.max(ends, axis=0)
    num_items = (whole + num_requests) * KV_HEADS
    turn = 0
    tile = 0
    item = gl.program_id(0)
    while item < num_items:
        head = item % KV_HEADS
        index = item // KV_HEADS
        before = ends <= index
        r = gl.sum(before.to(gl.int32), axis=0)
        begin = (index - gl.max(gl.where(before, ends, 0), axis=0)) * size
        if index >= whole:
            r = index - whole
        context = gl.max(gl.where(i == r, contexts, 0), axis=0)
        row = gl.max(gl.where(i == r, first_rows, 0), axis=0)
        if index >= whole:
            begin = context // size * size
        end = gl.minimum(begin + size, context)
        if begin < end:
            slot = turn % AHEAD
            mbarrier.wait(items_empty.index(slot), (turn // AHEAD & 1) ^ 1)
            field = gl.arange(0, FIELDS, gl.BlockedLayout([FIELDS], [32], [1], [0]))
            fields = gl.where(field == 0, r * KV_HEADS + head, gl.where(field == 1, row, context))
            fields = gl.where(field == 3, begin, gl.where(field == 4, end, fields))
            items.index(slot).store(fields)
            mbarrier.arrive(items_full.index(slot))
            turn += 1
        table = tables + r.to(gl.int64) * table_stride
        # the next item is asked for while the ring is full, or at the end
        asked = gl.maximum(gl.minimum(begin + STAGES * 64, end) - 64, begin)
        following = num_items
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
            if (start <= asked) & (start + 64 > asked):
                following = gl.atomic_add(counters, 1) + programs
        if begin >= end:
            following = gl.atomic_add(counters, 1) + programs
        item = following
    slot = turn % AHEAD
    mbarrier.wait(items_empty.index(slot), (turn // AHEAD & 1) ^ 1)
    items.index(slot).store(gl.full([FIELDS], -1, gl.int32, gl.BlockedLayout([FIELDS], [32], [1], [0])))
    mbarrier.arrive(items_full.index(slot))
    # the last program leaves the counters as it found them
    if gl.atomic_add(counters + 1, 1) == programs - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon_jit()
def _announced(items: Any, items_full: Any, items_empty: Any, turn: Any) -> Any:
    """The item of a turn: request and key head in one number (-1: there is none), its row and context, its keys
    [begin, end)."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    slot = turn % AHEAD
    mbarrier.wait(items_full.index(slot), turn // AHEAD & 1)
    fields = items.index(slot).load(LAYOUT)
    mbarrier.arrive(items_empty.index(slot))
    field = gl.arange(0, FIELDS, LAYOUT)
    none = gl.full([FIELDS], -1, gl.int32, LAYOUT)
    return (
        gl.max(gl.where(field == 0, fields, none), axis=0),
        gl.max(gl.where(field == 1, fields, none), axis=0),
        gl.max(gl.where(field == 2, fields, none), axis=0),
        gl.max(gl.where(field == 3, fields, none), axis=0),
        gl.max(gl.where(field == 4, fields, none), axis=0),
    )


@gluon_jit()
def _partial(
    part_acc: Any, part_m: Any, part_l: Any, at: Any, s: Any, splits: Any, valid: Any, d: Any, DIM: gl.constexpr
) -> Any:
    """The partial of split `s` of rows whose first splits lie at `at`; from where all programs see it."""
    there = valid & (s < splits)
    m = gl.load(part_m + at + s, mask=there, other=LOWEST, cache_modifier=".cg")
    l = gl.load(part_l + at + s, mask=there, other=0.0, cache_modifier=".cg")  # noqa: E741
    acc_at = part_acc + (at + s)[:, None] * DIM + d[None, :]
    return m, l, gl.load(acc_at, mask=there[:, None] & (d < DIM)[None, :], other=0.0, cache_modifier=".cg")


@gluon_jit()
def _merge_all(
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    sinks: Any,
    out: Any,
    place: Any,
    row: Any,
    head: Any,
    splits: Any,
    max_splits: Any,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    HAS_SINKS: gl.constexpr,
) -> None:
    """Merge the splits of one row's heads that share a key head, ascending."""
    BLOCK_DIM: gl.constexpr = triton.next_power_of_2(DIM)
    BLOCK_ROWS: gl.constexpr = triton.next_power_of_2(GROUP)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_DIM, BLOCK_DIM // 4], [4, 1], [1, 0])
    i = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, LAYOUT))
    valid = i < GROUP
    query_head = head * GROUP + i
    at = place + i * max_splits
    m = gl.full([BLOCK_ROWS], LOWEST, gl.float32, gl.SliceLayout(1, LAYOUT))
    l = gl.zeros([BLOCK_ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))  # noqa: E741
    if HAS_SINKS:
        m = gl.load(sinks + query_head, mask=valid, other=0.0) * LOG2_E
        l = gl.full([BLOCK_ROWS], 1.0, gl.float32, gl.SliceLayout(1, LAYOUT))  # noqa: E741
    acc = gl.zeros([BLOCK_ROWS, BLOCK_DIM], gl.float32, LAYOUT)
    MERGED: gl.constexpr = 16 if BLOCK_ROWS * BLOCK_DIM <= 512 else 8 if BLOCK_ROWS * BLOCK_DIM <= 1024 else 4
    for s in range(0, splits, MERGED):
        # all loads come before the first merge
        parts: Any = ()
        for j in gl.static_range(MERGED):
            parts = parts + (_partial(part_acc, part_m, part_l, at, s + j, splits, valid, d, DIM),)  # noqa: RUF005
        # merging what lies past the end changes nothing
        for j in gl.static_range(MERGED):
            m, l, acc = next_state(m, l, acc, parts[j][0], parts[j][1], parts[j][2])  # noqa: E741
    out_at = out + ((row.to(gl.int64) * HEADS + query_head) * DIM)[:, None] + d[None, :]
    result = (acc / l[:, None]).to(out.dtype.element_ty)
    gl.store(out_at, result, mask=valid[:, None] & (d < DIM)[None, :])


@gluon_jit()
def consume(
    qkv: Any,
    starts: Any,
    lens: Any,
    sinks: Any,
    out: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    arrived: Any,
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
    max_splits: Any,
    scale_log2: Any,
    KV_HEADS: gl.constexpr,
    KV_PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_DIM: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Computes the partial of every item announced, and merges those of a request that it completes."""
    dtype: gl.constexpr = k_ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_DIM, 16])
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    P_OF_A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    P_OF_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    HEADS: gl.constexpr = KV_HEADS * GROUP
    n = gl.arange(0, TILE, gl.SliceLayout(0, S))
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, A))
    i_q = gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    i_s = gl.arange(0, ROWS, gl.SliceLayout(1, S))
    i_l = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    i = gl.arange(0, ROWS, gl.SliceLayout(1, A))
    no_scores = gl.zeros([ROWS, TILE], gl.float32, S)
    tile = 0
    turn = 0
    item, row, context, begin, end = _announced(items, items_full, items_empty, turn)
    # no rows where there is no item
    q = queries(qkv, i_q, item % KV_HEADS, row, item + 1, 0, KV_HEADS, KV_PARTS, GROUP, DIM, 1, Q)
    while item >= 0:
        last = context - 1
        # the place of its first split
        place = (item.to(gl.int64) * GROUP) * max_splits
        for low in range(begin, end, SPLIT):
            m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
            acc = gl.zeros([ROWS, BLOCK_DIM], gl.float32, A)
            l = gl.zeros([ROWS, 8], gl.float32, L)  # noqa: E741
            for start in range(low, gl.minimum(low + SPLIT, end), 64):
                stage = tile % STAGES
                phase = tile // STAGES & 1
                mbarrier.wait(k_full.index(stage), phase)
                scores = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(k_empty.index(stage))
                m, p, alpha = weigh(scores, m, start + n, last + i_s * 0, scale_log2, start + 63 > last, 0)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, A))[:, None]
                l = l * gl.convert_layout(alpha, gl.SliceLayout(1, L))[:, None]  # noqa: E741
                weights = p.to(dtype)
                mbarrier.wait(v_full.index(stage), phase)
                if start + 64 > context:
                    clear_unwritten(v_ring.index(stage), start, context)
                acc = warpgroup_mma(gl.convert_layout(weights, P_OF_A), v_ring.index(stage), acc, is_async=True)
                l = warpgroup_mma(gl.convert_layout(weights, P_OF_L), ones, l, is_async=True)  # noqa: E741
                acc, l = warpgroup_mma_wait(0, deps=[acc, l])  # noqa: E741
                mbarrier.arrive(v_empty.index(stage))
                tile += 1
            first = place + low // SPLIT
            at = part_acc + (first + i * max_splits)[:, None] * DIM + d[None, :]
            gl.store(at, acc, mask=(i < GROUP)[:, None] & (d < DIM)[None, :])
            gl.store(part_m + first + i_s * max_splits, m, mask=i_s < GROUP)
            # all columns hold the row's sum
            gl.store(part_l + first + i_l * max_splits, gl.max(l, axis=1), mask=i_l < GROUP)
        turn += 1
        own, own_row = item, row
        splits = (context + SPLIT - 1) // SPLIT
        complete = (end - begin + SPLIT - 1) // SPLIT
        # the next item's queries come while this one is counted
        item, row, context, begin, end = _announced(items, items_full, items_empty, turn)
        q = queries(qkv, i_q, item % KV_HEADS, row, item + 1, 0, KV_HEADS, KV_PARTS, GROUP, DIM, 1, Q)
        # partials are complete before they are counted
        join_threads()
        count = arrived + own
        if complete < splits:
            complete += gl.atomic_add(count, complete)
        if complete == splits:
            _merge_all(
                part_acc, part_m, part_l, sinks, out, place, own_row, own % KV_HEADS, splits, max_splits, HEADS, GROUP,
                DIM, HAS_SINKS,
            )  # fmt: skip
            gl.store(count, 0)
