"""Attention over the paged cache, with its projections.

# T tokens, S rows that are read, Hq query heads, Hkv key heads, D head dimension
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.kernels.attention import KvCache, paged_attention
from sempre.kernels.rope import RopeSpec, rope_and_cache_write
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.module import Build, Module, Scratch, require_cpu
from sempre.workers.layers.norm import HeadNorm
from sempre.workers.steps import StepInput


@dataclass(frozen=True)
class AttentionShape:
    """What distinguishes the attention of one layer from another's."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """of the scores"""
    rope: RopeSpec
    window: int | None
    """keys visible to a query, itself included; None: all"""
    qkv_bias: bool
    o_bias: bool
    qk_norm_eps: float | None
    """of the RMSNorm of each head before the rotation; None: without one"""
    soft_cap: float | None = None
    """of the scores, which are cap * tanh(score / cap)"""


class Attention(Module):
    """Writes the step's keys and values; the result is of the rows that are read."""

    def __init__(self, build: Build, shape: AttentionShape) -> None:
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.heads = shape
        self.qkv_proj = Linear(build, parts, shape.hidden_size, bias=shape.qkv_bias, role="qkv")
        self.q_norm = self.k_norm = None
        if shape.qk_norm_eps is not None:
            self.q_norm = HeadNorm(shape.head_dim, shape.qk_norm_eps)
            self.k_norm = HeadNorm(shape.head_dim, shape.qk_norm_eps)
        self.o_proj = Linear(build, {"o_proj": shape.hidden_size}, queries, bias=shape.o_bias)

    def allocate(self, scratch: Scratch) -> None:
        """Raises ModelError where it cannot be computed."""
        if self.heads.soft_cap is not None:
            require_cpu(scratch, "attn_logit_softcapping", "a soft cap of attention's scores")
        self._table = scratch.rope_table(self.heads.rope)
        self._attended = scratch.rows("attended", self.o_proj.in_features)
        self._workspace = scratch.workspace

    def shape(self) -> tuple[object, ...]:
        return (self.heads,)

    def __call__(self, x: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor:
        """[T, H] → [S, H]"""
        heads = self.heads
        qkv = self.qkv_proj(x)
        rope_and_cache_write(
            qkv,
            step.positions,
            self._table,
            step.slot_mapping,
            cache.k,
            cache.v,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            q_norm=self.q_norm.weight if self.q_norm is not None else None,
            k_norm=self.k_norm.weight if self.k_norm is not None else None,
            eps=heads.qk_norm_eps or 0.0,
        )
        starts, most, read = step.query_starts, step.max_query_len, step.outputs
        if read is not None:
            qkv, starts, most = qkv.index_select(0, read.rows), read.starts, read.max_per_request
        attended = self._attended[: qkv.shape[0]]
        if qkv.shape[0]:
            paged_attention(
                qkv,
                cache,
                step.block_tables,
                starts,
                step.context_lens,
                num_heads=heads.num_heads,
                num_kv_heads=heads.num_kv_heads,
                head_dim=heads.head_dim,
                scale=heads.scale,
                window=heads.window,
                soft_cap=heads.soft_cap,
                out=attended,
                max_query_len=most,
                max_context_len=step.max_context_len,
                workspace=self._workspace,
            )
        return self.o_proj(attended)
