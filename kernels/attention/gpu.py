"""GPU paged attention: one order of keys for decode, chunks and whole prompts, and three ways to run it.

# R requests, T query tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, B keys per block, S splits
A program owns one query tile (a few tokens of one request, times the G heads that share a key head). Contexts of one
split need no merge; longer ones are walked by one program, or their splits run in parallel into scratch and a second
kernel merges them: the same operations in the same ascending order, so the bits never tell which way was taken.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sempre.kernels.attention.cache import AttentionWorkspace, KvCache
from sempre.kernels.attention.gpu_tiles import LOWEST, find_request, merge, prefetch_tiles, walk_split
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous

# a property of the result: never change it with the shape of a step
SPLIT = 512
# enough programs to fill the device; only decides between equal ways
TARGET_PROGRAMS = 528
FEW_PROGRAMS = 132
# a step of more query tokens than this fills the device without parallel splits
MAX_SPLIT_TOKENS = 64

ONE_SPLIT, WALK, PARALLEL = 0, 1, 2


class Launch(NamedTuple):
    """Rows of a query tile, and how its program is compiled."""

    block_m: int
    num_warps: int
    num_stages: int


def launch_shape(rows: int, programs: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """For requests of at most `rows` query rows (tokens times G), in about `programs` programs; as measured on H100."""
    if dtype == torch.float32:
        return Launch(16, 4, 1)
    if rows > 16:
        return Launch(64 if rows > 32 else 32, 8 if head_dim > 128 else 4, 2)
    if block_size < 64 or head_dim > 128:
        # gathered blocks take registers: more warps share them
        return Launch(16, 4, 2)
    # few programs wait for memory: more of it in flight
    return Launch(16, 4, 5) if programs < FEW_PROGRAMS else Launch(16, 2, 3)


@jit(runtime=("num_requests", "table_stride", "max_splits"))
def _attend(
    qkv: Any,
    keys: Any,
    values: Any,
    tables: Any,
    starts: Any,
    lens: Any,
    out: Any,
    part_acc: Any,
    part_m: Any,
    part_l: Any,
    num_requests: Any,
    table_stride: Any,
    max_splits: Any,
    scale_log2: Any,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SINGLE_ROWS: tl.constexpr,
    MODE: tl.constexpr,
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
        # the keys of the step itself are being written, but that is seen when they are read
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
    row_size = (KV_HEADS * GROUP + 2 * KV_HEADS) * DIM
    q_at = qkv + (row + token).to(tl.int64)[:, None] * row_size + query_head[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=in_dim, other=0.0)
    out_row = (row + token).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // 64 * 64

    if MODE == 0:
        m, l, acc = walk_split(  # noqa: E741
            q, begin, end, first_position, position, end, keys, values, table, head, scale_log2,
            KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, BLOCK_M,
        )  # fmt: skip
        # as a merge into an empty state would leave it: no negative zero
        acc = acc + 0.0
        tl.store(out + out_row[:, None] * DIM + d[None, :], acc / l[:, None], mask=in_dim)
    elif MODE == 1:
        m = tl.full([BLOCK_M], LOWEST, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        for s in range(begin // SPLIT, (end + SPLIT - 1) // SPLIT):
            low, high = tl.maximum(begin, s * SPLIT), tl.minimum(end, s * SPLIT + SPLIT)
            m_split, l_split, acc_split = walk_split(
                q, low, high, first_position, position, end, keys, values, table, head, scale_log2,
                KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, BLOCK_M,
            )  # fmt: skip
            m, l, acc = merge(m, l, acc, m_split, l_split, acc_split)  # noqa: E741
        tl.store(out + out_row[:, None] * DIM + d[None, :], acc / l[:, None], mask=in_dim)
    else:
        for s in range(begin // SPLIT + tl.program_id(2), (end + SPLIT - 1) // SPLIT, tl.num_programs(2)):
            low, high = tl.maximum(begin, s * SPLIT), tl.minimum(end, s * SPLIT + SPLIT)
            m, l, acc = walk_split(  # noqa: E741
                q, low, high, first_position, position, end, keys, values, table, head, scale_log2,
                KV_HEADS, DIM, BLOCK_DIM, BLOCK, WINDOW, BLOCK_M,
            )  # fmt: skip
            at = out_row * max_splits + s
            tl.store(part_acc + at[:, None] * DIM + d[None, :], acc, mask=in_dim)
            tl.store(part_m + at, m, mask=valid)
            tl.store(part_l + at, l, mask=valid)


@jit(runtime=("num_requests", "max_splits"))
def _merge_splits(
    starts: Any,
    lens: Any,
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
    m = tl.full([1], LOWEST, tl.float32)
    l = tl.zeros([1], tl.float32)  # noqa: E741
    acc = tl.zeros([1, BLOCK_DIM], tl.float32)
    for s in range(begin // SPLIT, position // SPLIT + 1):
        at = out_row * max_splits + s
        acc_split = tl.load(part_acc + at * DIM + d, mask=d < DIM, other=0.0)
        m, l, acc = merge(m, l, acc, tl.load(part_m + at + one), tl.load(part_l + at + one), acc_split)  # noqa: E741
    tl.store(out + out_row * DIM + d, acc / l[:, None], mask=d < DIM)


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
    )


def _prefetched_tiles(programs: int, block_size: int, head_dim: int) -> int:
    """Tiles of keys that a decode program asks for before its query is there: what fits the L2 cache together."""
    if block_size != 64 or head_dim & (head_dim - 1) or programs > TARGET_PROGRAMS:
        return 0
    return 4 if programs < FEW_PROGRAMS else 1


def paged_attention(
    qkv: torch.Tensor,
    cache: KvCache,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    workspace: AttentionWorkspace | None = None,
) -> torch.Tensor:
    """As on CPU; the host-known bounds `max_query_len` and `max_context_len` of any request only choose grids.

    A request without rows, or with a context shorter than its rows, is skipped: its rows of `out` keep their values.
    `workspace` lets few query tiles fill the device; without it, or where it is too small, one program walks all
    splits.
    """
    num_requests = context_lens.shape[0]
    if qkv.shape[0] == 0 or num_requests == 0:
        return out
    group = num_heads // num_kv_heads
    lengths = (True,) if max_query_len == 1 else (True, False)
    for single_rows in lengths:
        rows = group if single_rows else max_query_len * group
        shape = launch_shape(rows, num_requests * num_kv_heads, cache.k.shape[2], head_dim, qkv.dtype)
        if single_rows:
            tiles = num_requests
            shape = shape._replace(block_m=max(shape.block_m, triton.next_power_of_2(group)))
        else:
            tiles = qkv.shape[0] // (shape.block_m // group) + num_requests
        _launch(
            qkv, cache, block_tables, query_starts, context_lens, out, workspace, shape, tiles, single_rows,
            num_kv_heads, group, head_dim, scale, window or 0, max_context_len,
        )  # fmt: skip
    return out


def _launch(
    qkv: torch.Tensor,
    cache: KvCache,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: AttentionWorkspace | None,
    shape: Launch,
    tiles: int,
    single_rows: bool,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    scale: float,
    window: int,
    max_context_len: int,
) -> None:
    num_requests = context_lens.shape[0]
    splits = triton.cdiv(max_context_len, SPLIT)
    parallel = min(splits, TARGET_PROGRAMS // (tiles * num_kv_heads))
    mode = ONE_SPLIT if splits == 1 else WALK
    if workspace is not None and parallel > 1 and workspace.holds(qkv.shape[0], splits):
        mode = PARALLEL
    part_acc = part_m = part_l = None
    max_splits = 0
    if mode == PARALLEL and workspace is not None:
        part_acc, part_m, part_l, max_splits = workspace.acc, workspace.m, workspace.l, workspace.max_splits
    block_dim = triton.next_power_of_2(head_dim)
    _attend[(num_kv_heads, tiles, parallel if mode == PARALLEL else 1)](
        qkv,
        cache.k,
        cache.v,
        block_tables,
        query_starts,
        context_lens,
        out,
        part_acc,
        part_m,
        part_l,
        num_requests,
        block_tables.stride(0),
        max_splits,
        scale * math.log2(math.e),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK=cache.k.shape[2],
        WINDOW=window,
        SPLIT=SPLIT,
        BLOCK_M=shape.block_m,
        SINGLE_ROWS=single_rows,
        MODE=mode,
        PREFETCH=_prefetched_tiles(num_requests * num_kv_heads, cache.k.shape[2], head_dim)
        if single_rows and not window
        else 0,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **CHAINED,
    )
    if mode == PARALLEL:
        heads = num_kv_heads * group
        rows = num_requests if single_rows else qkv.shape[0] + num_requests
        _merge_splits[(heads, rows)](
            query_starts,
            context_lens,
            out,
            part_acc,
            part_m,
            part_l,
            num_requests,
            max_splits,
            HEADS=heads,
            DIM=head_dim,
            BLOCK_DIM=block_dim,
            WINDOW=window,
            SPLIT=SPLIT,
            SINGLE_ROWS=single_rows,
            num_warps=1,
            **CHAINED,
        )
