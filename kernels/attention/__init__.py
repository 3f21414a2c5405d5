"""Causal attention over a paged KV cache, grouped queries, optional sliding window.

Contract: keys and values are in the cache before the call. Every query row walks the keys in tiles of 64 from
position 0 upwards (from the first tile its window touches), with the online softmax of Milakov and Gimelshein (2018,
arXiv 1805.02867). Masked keys contribute exact zeros, and a fully masked tile changes nothing, so a row's bits are
the same in a decode step, a chunk of any length, or a whole prompt, and beside any other row. That holds also beside
keys and values that are not finite: the CPU skips masked values, and on a GPU, whose tensor cores multiply whole
tiles, values in the cache are finite (see `kernels.rope`) and slots that were never written are not read.

CPU: scores are one chain of fused multiply-adds over D; the row's sum adds 4 vectors of 16 lanes as (0 + 1) + (2 + 3)
and then a fixed tree; values are added one key after the other. GPU: sums run in the tensor core's steps, and splits
of a fixed number of keys are merged in ascending order, by one program or by many.
"""

from __future__ import annotations

import torch

from sempre.kernels.attention.cache import AttentionWorkspace, KvCache, allocate_gpu_cache
from sempre.kernels.checks import check_index, check_rows

__all__ = [
    "AttentionWorkspace",
    "KvCache",
    "allocate_kv_cache",
    "paged_attention",
]

CPU = torch.device("cpu")


def allocate_kv_cache(
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> KvCache:
    """A cache of zeros for one layer. ValueError for a block size or head dim that the device's kernel cannot take."""
    if device.type == "cpu":
        from sempre.kernels.attention import cpu

        return cpu.allocate_kv_cache(num_blocks, num_kv_heads, head_dim, block_size, dtype)
    return allocate_gpu_cache(num_blocks, num_kv_heads, head_dim, block_size, dtype, device)


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
    soft_cap: float | None = None,
    out: torch.Tensor,
    max_query_len: int | None = None,
    max_context_len: int | None = None,
    workspace: AttentionWorkspace | None = None,
) -> torch.Tensor:
    """Attention of the queries in qkv [T, (Hq + 2 Hkv) D] over the cache into out [T, Hq D].

    `block_tables` int32 [R, most blocks], `query_starts` int32 [R + 1] (rows of request r are
    [query_starts[r], query_starts[r + 1])), `context_lens` int32 [R] (keys visible to the request's last row).
    `window`: a row sees the last `window` keys up to itself; None sees all. `soft_cap`: scores are cap * tanh(score /
    cap), on a CPU only. `max_query_len` and `max_context_len` are
    upper bounds of a request's rows and context, known to the host, needed on a GPU and without influence on the
    result; so is `workspace`.

    IndexError on the CPU for arrays that do not fit each other, or that name a block outside the cache.
    """
    check_rows("paged_attention", qkv, out)
    check_index("paged_attention", "block_tables", block_tables, torch.int32)
    check_index("paged_attention", "query_starts", query_starts, torch.int32)
    check_index("paged_attention", "context_lens", context_lens, torch.int32)
    if not qkv.is_cuda:
        from sempre.kernels.attention import cpu

        return cpu.paged_attention(
            qkv,
            cache,
            block_tables,
            query_starts,
            context_lens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            out=out,
        )
    from sempre.kernels.attention import gpu

    if soft_cap is not None:
        raise ValueError("paged_attention: a soft cap of the scores runs on a CPU only")
    if max_query_len is None or max_context_len is None:
        raise ValueError("paged_attention: a GPU needs max_query_len and max_context_len, which fix the grids")
    return gpu.paged_attention(
        qkv,
        cache,
        block_tables,
        query_starts,
        context_lens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        out=out,
        max_query_len=max_query_len,
        max_context_len=max_context_len,
        workspace=workspace,
    )
