"""Attention with a gradient: norm of heads, rope, the cache and paged attention as in the engine.

# T tokens, Hq query heads, Hkv key heads, D head dimension
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import Function

from sempre.kernels.attention import (
    AttentionWorkspace,
    HeadLayout,
    HeadNorms,
    KvCache,
    PagedBatch,
    ScoreParams,
    paged_attention,
)
from sempre.kernels.rope import rope_and_cache_write
from sempre.workers.trainer.formulas import attention_backward, rms_norm_backward, rope_backward
from sempre.workers.trainer.operations import applied


class AttentionCall(NamedTuple):
    """What is not a tensor with a gradient. Every sequence of the batch begins at position 0."""

    heads: HeadLayout
    scores: ScoreParams
    table: torch.Tensor
    """of rope"""
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    batch: PagedBatch
    cache: KvCache
    workspace: AttentionWorkspace | None
    eps: float | None
    """of the norms of heads; None: without"""


def attention(
    rows: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """rows [T, (Hq + 2 Hkv) D], norms [D] → [T, Hq D]"""
    return cast(torch.Tensor, applied(_Attention, rows, q_norm, k_norm, call))


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        call: AttentionCall,
    ) -> torch.Tensor:
        heads, work, norms = call.heads, rows.clone(), None
        if q_norm is not None and k_norm is not None and call.eps is not None:
            norms = HeadNorms(q_norm.to(rows.dtype), k_norm.to(rows.dtype), call.eps)
        rope_and_cache_write(work, call.positions, call.table, call.slot_mapping, call.cache, heads, norms)
        out = torch.empty((rows.shape[0], heads.num_heads * heads.head_dim), dtype=rows.dtype, device=rows.device)
        paged_attention(work, call.cache, call.batch, heads, call.scores, out, call.workspace)
        turned = work[:, : out.shape[1]].clone()
        ctx.save_for_backward(rows, q_norm, k_norm, turned, *_cached(call.cache, call.slot_mapping))
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, q_norm, k_norm, turned, keys, values = ctx.saved_tensors
        call: AttentionCall = ctx.call
        heads = call.heads
        q = turned.float().view(-1, heads.num_heads, heads.head_dim)
        grad = grads[0].float().view_as(q)
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
        starts = call.batch.query_starts.tolist()
        for start, end in pairwise(starts):
            own = slice(start, end)
            of_q[own], of_k[own], of_v[own] = attention_backward(grad[own], q[own], keys[own], values[own], call.scores)
        cosines, sines = call.table[call.positions].chunk(2, dim=-1)
        of_q, of_k = rope_backward(of_q, cosines, sines), rope_backward(of_k, cosines, sines)
        of_q_norm = of_k_norm = None
        if q_norm is not None and call.eps is not None:
            before = rows.float().view(rows.shape[0], -1, heads.head_dim)
            of_keys = slice(heads.num_heads, heads.num_heads + heads.num_kv_heads)
            of_q, of_q_norm = rms_norm_backward(of_q, before[:, : heads.num_heads], q_norm, call.eps)
            of_k, of_k_norm = rms_norm_backward(of_k, before[:, of_keys], k_norm, call.eps)
        of_rows = torch.cat([of_q, of_k, of_v], dim=1).view_as(rows).to(rows.dtype)
        return of_rows, of_q_norm, of_k_norm, None


def _cached(cache: KvCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of these slots, float32 [T, Hkv, D]."""
    block_size = cache.v.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    keys = cache.k[blocks, :, :, offsets] if cache.k.device.type == "cpu" else cache.k[blocks, :, offsets]
    return keys.float(), cache.v[blocks, :, offsets].float()
