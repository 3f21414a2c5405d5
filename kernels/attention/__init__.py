"""Causal attention over a paged KV cache, grouped queries, optional sliding window and sinks.

Contract: keys and values are in the cache before the call. Every query row visits the keys in tiles of 64 from position
0 upwards (from the first tile its window touches), with the online softmax of Milakov and Gimelshein (2018, arXiv
1805.02867). Masked keys contribute exact zeros, and a fully masked tile changes nothing, so a row's bits are the same
in a decode step, a chunk of any length, or a whole prompt, and next to any other row. This holds even next to keys and
values that are not finite: the CPU skips masked values, and on a GPU, whose tensor cores multiply whole tiles, values
in the cache are finite (see `kernels.rope`) and slots that were never written are not read.

CPU: scores are one chain of fused multiply-adds over D; the row's sum adds 4 vectors of 16 lanes as (0 + 1) + (2 + 3)
and then a fixed tree; values are added one key after the other. GPU: sums run in the tensor core's steps, and splits
of a fixed number of keys are merged in ascending order, by one program or by many, each split's sums computed for one
request or for all that share its blocks. A sink (Xiao et al. 2023, arXiv 2309.17453) is what a row begins with on a
CPU, and what the merge of its splits begins with on a GPU: a sum of one, at a maximum of the sink's score. So it is
added once, however the keys are walked.

A cache of fp8, on a CPU, has a scale for each key and each value of a head, made of that row alone (`kernels.fp8`).
What is read is element times scale, rounded to float32: the result is that of a float32 cache with these contents, bit
for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sempre.kernels.attention.contract import (
    AttentionWorkspace,
    HeadLayout,
    HeadNorms,
    KvCache,
    PagedBatch,
    ScoreParams,
)
from sempre.kernels.attention.shared_prefixes import SharedPrefixes
from sempre.kernels.checks import check_rows
from sempre.kernels.fp8 import FP8
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.attention import cpu as _cpu
    from sempre.kernels.attention import gpu as _gpu
    from sempre.kernels.attention import gpu_prefix as _gpu_prefix
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")
    _gpu_prefix = LazyModule(__name__, "gpu_prefix")

__all__ = [
    "AttentionWorkspace",
    "HeadLayout",
    "HeadNorms",
    "KvCache",
    "PagedBatch",
    "ScoreParams",
    "SharedPrefixes",
    "allocate_kv_cache",
    "paged_attention",
]

CPU = torch.device("cpu")
# keys in a block
CPU_BLOCK_SIZES, GPU_BLOCK_SIZES = (16,), (16, 32, 64)


def allocate_kv_cache(
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> KvCache:
    """A cache of zeros for one layer. ValueError for a block size or head dim that the device's kernel does not
    support, and for fp8 on a GPU."""
    sizes = CPU_BLOCK_SIZES if device.type == "cpu" else GPU_BLOCK_SIZES
    if block_size not in sizes:
        raise ValueError(f"block_size must be one of {sizes} on {device.type}, got {block_size}")
    if head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    if device.type == "cpu":
        return _cpu.allocate_kv_cache(num_blocks, num_kv_heads, head_dim, block_size, dtype)
    if dtype is FP8:
        raise ValueError(f"a KV cache of {dtype} is for CPUs only, got {device.type}")
    return _gpu.allocate_kv_cache(num_blocks, num_kv_heads, head_dim, block_size, dtype, device)


def paged_attention(
    qkv: torch.Tensor,
    cache: KvCache,
    batch: PagedBatch,
    heads: HeadLayout,
    scores: ScoreParams,
    out: torch.Tensor,
    workspace: AttentionWorkspace | None = None,
) -> torch.Tensor:
    """Attention of the queries in qkv [T, (Hq + P Hkv) D] over the cache into, and returning, out [T, Hq D].

    Nothing is written where there are no rows or no requests. `workspace` lets a GPU run splits in parallel, without
    any effect on the result.

    IndexError on the CPU for a batch that does not fit qkv, or that names a block outside the cache; ValueError for
    other sinks than one for each head.
    """
    check_rows("paged_attention", qkv, out)
    num_rows = qkv.shape[0]
    if not num_rows or not batch.num_requests:
        return out
    heads.check_rows("paged_attention", qkv, num_rows)
    scores.check_sinks("paged_attention", heads)
    if qkv.is_cuda:
        if _gpu_prefix.can_share(batch, heads, scores, workspace):
            return _gpu_prefix.paged_attention(qkv, cache, batch, heads, scores, out, workspace)
        return _gpu.paged_attention(qkv, cache, batch, heads, scores, out, workspace)
    wrong = _cpu.first_outside(batch, min(num_rows, out.shape[0]), cache.k.shape[0])
    if wrong >= 0:
        raise IndexError(
            f"paged_attention: request {wrong} has rows, a context or blocks outside of qkv {tuple(qkv.shape)}, its"
            f" table of {batch.block_tables.shape[1]} blocks or the cache of {cache.k.shape[0]} blocks"
        )
    return _cpu.paged_attention(qkv, cache, batch, heads, scores, out)
