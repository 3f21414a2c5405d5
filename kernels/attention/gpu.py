"""GPU paged attention: one order of keys for decode, chunks and whole prompts, and three ways to run it.

# R requests, T query tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, B keys per block, S splits
A program owns one query tile (a few tokens of one request, times the G heads that share a key head). Contexts of one
split need no merge; longer ones are processed by one program, or their splits run in parallel into scratch and a second
kernel merges them: the same operations in the same ascending order. Sinks are what a merge begins with.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sempre.kernels.attention import gpu_decode, gpu_prefill
from sempre.kernels.attention.contract import AttentionWorkspace, HeadLayout, KvCache, PagedBatch, ScoreParams
from sempre.kernels.attention.gpu_split_warps import MAX_REQUESTS
from sempre.kernels.attention.gpu_tiles import SPLIT, empty_state, find_request, merge, prefetch_tiles, walk_split
from sempre.kernels.attention.shared_prefixes import MAX_ENTRIES
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous

# enough programs to fill the device; only decides between equivalent launches
TARGET_PROGRAMS = 528
FEW_PROGRAMS = 132
# a step of more query tokens than this fills the device without parallel splits
MAX_SPLIT_TOKENS = 64
# a workspace for contexts of this many keys has room for all entries that a step may share
SHARED_LEN = MAX_ENTRIES // MAX_SPLIT_TOKENS * SPLIT
ONE_SPLIT, WALK, PARALLEL = 0, 1, 2


class Launch(NamedTuple):
    """Rows of a query tile, and how its program is compiled."""

    block_m: int
    num_warps: int
    num_stages: int


def launch_shape(rows: int, programs: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """For requests of at most `rows` query rows (tokens times G), in about `programs` programs; as measured on H100."""
    if head_dim > 256:
        # tiles of keys and values take most of the shared memory
        return Launch(16, 8, 1) if dtype == torch.float32 else Launch(32 if rows > 16 else 16, 8, 2)
    if dtype == torch.float32:
        return Launch(16, 4, 1)
    if rows > 16:
        return Launch(64 if rows > 32 else 32, 8 if head_dim > 128 else 4, 2)
    if block_size < 64 or head_dim > 128:
        # gathered blocks take registers: more warps share them
        return Launch(16, 4, 2)
    # few programs wait for memory: keep more loads in flight
    return Launch(16, 4, 5) if programs < FEW_PROGRAMS else Launch(16, 2, 3)


@jit(runtime=("num_requests", "table_stride", "max_splits"))
def _attend(
    qkv: Any,
    keys: Any,
    values: Any,
    tables: Any,
    starts: Any,
    lens: Any,
    sinks: Any,
    out: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    num_requests: Any,
    table_stride: Any,
    max_splits: Any,
    scale_log2: Any,
    KV_HEADS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAP_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SINGLE_ROWS: tl.constexpr,
    MODE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PREFETCH: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    if SINGLE_ROWS:
        r = tl.program_id(1)
        first = 0
    else:
        # the last tiles have the most keys: start them first
        index = tl.num_programs(1) - 1 - tl.program_id(1)
        r = find_request(starts, index, num_requests, TOKENS)
        first = (index - tl.load(starts + r) // TOKENS - r) * TOKENS
    row = tl.load(starts + r)
    count = tl.load(starts + r + 1) - row
    context = tl.load(lens + r)
    table = tables + r.to(tl.int64) * table_stride
    if PREFETCH > 0:
        # the step's own keys are still being written; they are visible by the time they are read
        prefetch_tiles(context, tl.program_id(2) * SPLIT, keys, values, table, head, KV_HEADS, DIM, BLOCK, PREFETCH)
    wait_for_previous()
    # requests of one row belong to the other launch; padding has no rows or no context
    if (first >= count) | (context < count) | ((count == 1) != SINGLE_ROWS):
        return

    i = tl.arange(0, BLOCK_M)
    token = first + i // GROUP
    valid = (i // GROUP < TOKENS) & (token < count)
    first_position = context - count + first
    position = context - count + token
    end = tl.minimum(first_position + TOKENS, context)
    d = tl.arange(0, BLOCK_DIM)
    in_dim = valid[:, None] & (d < DIM)[None, :]
    query_head = head * GROUP + i % GROUP
    row_size = (KV_HEADS * GROUP + KV_PARTS * KV_HEADS) * DIM
    q_at = qkv + (row + token).to(tl.int64)[:, None] * row_size + query_head[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=in_dim, other=0.0)
    out_row = (row + token).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // 64 * 64

    if MODE == 0:
        m, l, acc = walk_split(  # noqa: E741
            q, begin, end, first_position, position, end, keys, values, table, head, scale_log2,
            KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, SOFT_CAP, CAP_SCALE, BLOCK_M,
        )  # fmt: skip
        if HAS_SINKS:
            none = empty_state(sinks, query_head, BLOCK_M, BLOCK_DIM, HAS_SINKS)
            m, l, acc = merge(none[0], none[1], none[2], m, l, acc)  # noqa: E741
        else:
            # as a merge into an empty state leaves it: no negative zero
            acc = acc + 0.0
        tl.store(out + out_row[:, None] * DIM + d[None, :], acc / l[:, None], mask=in_dim)
    elif MODE == 1:
        m, l, acc = empty_state(sinks, query_head, BLOCK_M, BLOCK_DIM, HAS_SINKS)  # noqa: E741
        for s in range(begin // SPLIT, (end + SPLIT - 1) // SPLIT):
            low, high = tl.maximum(begin, s * SPLIT), tl.minimum(end, s * SPLIT + SPLIT)
            m_split, l_split, acc_split = walk_split(
                q, low, high, first_position, position, end, keys, values, table, head, scale_log2,
                KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, SOFT_CAP, CAP_SCALE, BLOCK_M,
            )  # fmt: skip
            m, l, acc = merge(m, l, acc, m_split, l_split, acc_split)  # noqa: E741
        tl.store(out + out_row[:, None] * DIM + d[None, :], acc / l[:, None], mask=in_dim)
    else:
        for s in range(begin // SPLIT + tl.program_id(2), (end + SPLIT - 1) // SPLIT, tl.num_programs(2)):
            low, high = tl.maximum(begin, s * SPLIT), tl.minimum(end, s * SPLIT + SPLIT)
            m, l, acc = walk_split(  # noqa: E741
                q, low, high, first_position, position, end, keys, values, table, head, scale_log2,
                KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, SOFT_CAP, CAP_SCALE, BLOCK_M,
            )  # fmt: skip
            at = out_row * max_splits + s
            tl.store(part_acc + at[:, None] * DIM + d[None, :], acc, mask=in_dim)
            tl.store(part_m + at, m, mask=valid)
            tl.store(part_l + at, l, mask=valid)


@jit(runtime=("num_requests", "max_splits"))
def _merge_splits(
    starts: Any,
    lens: Any,
    sinks: Any,
    out: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    num_requests: Any,
    max_splits: Any,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE_ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """One program merges the splits of one token and head, ascending."""
    head = tl.program_id(0)
    if SINGLE_ROWS:
        r = tl.program_id(1)
        first = 0
    else:
        index = tl.program_id(1)
        r = find_request(starts, index, num_requests, 1)
        first = index - tl.load(starts + r) - r
    row = tl.load(starts + r)
    count = tl.load(starts + r + 1) - row
    context = tl.load(lens + r)
    wait_for_previous()
    if (first >= count) | (context < count) | ((count == 1) != SINGLE_ROWS):
        return
    position = context - count + first
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, 0)
    d = tl.arange(0, BLOCK_DIM)[None, :]
    out_row = (row + first).to(tl.int64) * HEADS + head
    one = tl.zeros([1], tl.int32)
    m, l, acc = empty_state(sinks, head + one, 1, BLOCK_DIM, HAS_SINKS)  # noqa: E741
    for s in range(begin // SPLIT, position // SPLIT + 1):
        at = out_row * max_splits + s
        acc_split = tl.load(part_acc + at * DIM + d, mask=d < DIM, other=0.0)
        m, l, acc = merge(m, l, acc, tl.load(part_m + at + one), tl.load(part_l + at + one), acc_split)  # noqa: E741
    tl.store(out + out_row * DIM + d, acc / l[:, None], mask=d < DIM)


def allocate_kv_cache(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KvCache:
    """A cache of zeros."""
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return KvCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def allocate_attention_workspace(
    num_heads: int, head_dim: int, max_model_len: int, device: torch.device
) -> AttentionWorkspace:
    """Scratch for contexts up to `max_model_len`; one serves all layers of a runner, whose launches are in order."""
    splits = -(-max_model_len // SPLIT)
    shape = (MAX_SPLIT_TOKENS, num_heads, splits)
    return AttentionWorkspace(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.zeros(MAX_REQUESTS * num_heads, dtype=torch.int32, device=device),
    )


def prefetched_tiles(programs: int, block_size: int, head_dim: int) -> int:
    """Tiles of keys that a decode program prefetches before its query is ready: what fits the L2 cache in total."""
    if block_size != 64 or head_dim & (head_dim - 1) or programs > TARGET_PROGRAMS:
        return 0
    return 4 if programs < FEW_PROGRAMS else 1


class Inputs(NamedTuple):
    """The arguments of `paged_attention`."""

    qkv: torch.Tensor
    cache: KvCache
    batch: PagedBatch
    heads: HeadLayout
    scores: ScoreParams
    out: torch.Tensor
    workspace: AttentionWorkspace | None


class Plan(NamedTuple):
    """One launch: of the requests of one row, or of the others, with the number of query tiles and parallel splits."""

    single_rows: bool
    tiles: int
    splits: int
    mode: int
    launch: Launch
    workspace: AttentionWorkspace | None
    """where splits run in parallel"""


def _plan(inputs: Inputs, *, single_rows: bool) -> Plan:
    qkv, cache, batch, heads, _, _, workspace = inputs
    num_rows, num_requests = qkv.shape[0], batch.num_requests
    rows = heads.group if single_rows else batch.max_query_len * heads.group
    programs = num_requests * heads.num_kv_heads
    launch = launch_shape(rows, programs, cache.k.shape[2], heads.head_dim, qkv.dtype)
    if heads.group > launch.block_m:
        launch = launch._replace(block_m=triton.next_power_of_2(heads.group), num_stages=1)
    if single_rows:
        tiles = num_requests
    else:
        tiles = num_rows // (launch.block_m // heads.group) + num_requests
    splits = triton.cdiv(batch.max_context_len, SPLIT)
    parallel = min(splits, TARGET_PROGRAMS // (tiles * heads.num_kv_heads))
    if workspace is not None and parallel > 1 and workspace.holds(num_rows, splits):
        return Plan(single_rows, tiles, parallel, PARALLEL, launch, workspace)
    return Plan(single_rows, tiles, 1, ONE_SPLIT if splits == 1 else WALK, launch, None)


def paged_attention(
    qkv: torch.Tensor,
    cache: KvCache,
    batch: PagedBatch,
    heads: HeadLayout,
    scores: ScoreParams,
    out: torch.Tensor,
    workspace: AttentionWorkspace | None = None,
) -> torch.Tensor:
    """See the facade; the bounds of the batch only choose grids.

    A request without rows, or with a context shorter than its rows, is skipped: its rows of `out` keep their values.
    `workspace` lets few query tiles fill the device; without it, or where it is too small, one program processes all
    splits.
    """
    inputs = Inputs(qkv, cache, batch, heads, scores, out, workspace)
    for single_rows in (True,) if batch.max_query_len == 1 else (True, False):
        attend(inputs, single_rows=single_rows)
    return out


def attend(inputs: Inputs, *, single_rows: bool) -> None:
    """The requests of one row, or the others."""
    qkv, cache, batch, heads, scores, out, workspace = inputs
    if workspace is not None and single_rows and gpu_decode.serves(qkv, cache, batch, heads, scores, workspace):
        gpu_decode.paged_attention(qkv, cache, batch, heads, scores, out, workspace)
        return
    plan = _plan(inputs, single_rows=single_rows)
    in_turn = not single_rows and plan.mode != PARALLEL
    if workspace is not None and in_turn and gpu_prefill.serves(qkv, cache, batch, heads, scores):
        gpu_prefill.paged_attention(qkv, cache, batch, heads, scores, out, workspace)
        return
    _launch_attend(plan, inputs)
    if plan.workspace is not None:
        launch_merge(plan, plan.workspace, inputs)


def _launch_attend(plan: Plan, inputs: Inputs) -> None:
    qkv, cache, batch, heads, scores, out, _ = inputs
    part_acc = part_m = part_l = None
    max_splits = prefetched = 0
    if plan.workspace is not None:
        part_acc, part_m, part_l = plan.workspace.acc, plan.workspace.m, plan.workspace.l
        max_splits = plan.workspace.max_splits
    block_size, cap = cache.k.shape[2], scores.soft_cap
    if plan.single_rows and not scores.window:
        prefetched = prefetched_tiles(batch.num_requests * heads.num_kv_heads, block_size, heads.head_dim)
    _attend[(heads.num_kv_heads, plan.tiles, plan.splits)](
        qkv,
        cache.k,
        cache.v,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        scores.sinks,
        out,
        part_acc,
        part_m,
        part_l,
        batch.num_requests,
        batch.block_tables.stride(0),
        max_splits,
        (1.0 if cap else scores.scale) * math.log2(math.e),
        KV_HEADS=heads.num_kv_heads,
        KV_PARTS=heads.kv_parts,
        GROUP=heads.group,
        DIM=heads.head_dim,
        BLOCK_DIM=triton.next_power_of_2(heads.head_dim),
        BLOCK=block_size,
        WINDOW=scores.window or 0,
        SOFT_CAP=cap or 0.0,
        CAP_SCALE=scores.scale / cap if cap else 0.0,
        SPLIT=SPLIT,
        BLOCK_M=plan.launch.block_m,
        SINGLE_ROWS=plan.single_rows,
        MODE=plan.mode,
        HAS_SINKS=scores.sinks is not None,
        PREFETCH=prefetched,
        num_warps=plan.launch.num_warps,
        num_stages=plan.launch.num_stages,
        **CHAINED,
    )


def launch_merge(plan: Plan, partials: AttentionWorkspace, inputs: Inputs) -> None:
    """Merge the splits of each row that this plan's launch has computed."""
    batch, heads, scores, out = inputs.batch, inputs.heads, inputs.scores, inputs.out
    rows = batch.num_requests if plan.single_rows else out.shape[0] + batch.num_requests
    _merge_splits[(heads.num_heads, rows)](
        batch.query_starts,
        batch.context_lens,
        scores.sinks,
        out,
        partials.acc,
        partials.m,
        partials.l,
        batch.num_requests,
        partials.max_splits,
        HEADS=heads.num_heads,
        DIM=heads.head_dim,
        BLOCK_DIM=triton.next_power_of_2(heads.head_dim),
        WINDOW=scores.window or 0,
        SPLIT=SPLIT,
        SINGLE_ROWS=plan.single_rows,
        HAS_SINKS=scores.sinks is not None,
        num_warps=1,
        **CHAINED,
    )
