"""Attention over the paged cache, with its projections.

# T tokens, S rows that are read, Hq query heads, Hkv key heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sempre.kernels.activation import gate
from sempre.kernels.attention import HeadLayout, HeadNorms, KvCache, ScoreParams, paged_attention
from sempre.kernels.norms import rms_norm_of_parts
from sempre.kernels.rope import RopeSpec, head_order, rope_and_cache_write
from sempre.workers.layers.linear import HeadsLinear, Linear
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.layers.norm import HeadNorm, ProjectionNorm
from sempre.workers.layers.row_parallel import RowParallelLinear, Unsummed
from sempre.workers.steps import StepInput, batch_of_rows_read
from sempre.workers.tensor_source import Parameter


@dataclass(frozen=True)
class AttentionShape:
    """What may differ between the attention of two layers."""

    hidden_size: int
    heads: HeadLayout
    scores: ScoreParams
    rope: RopeSpec
    qkv_bias: bool
    o_bias: bool
    qk_norm_eps: float | None
    """of the RMSNorm of queries and keys before rope; None: without one"""
    qk_norm: type[HeadNorm] = HeadNorm
    """what that norm goes over"""
    v_norm: bool = False
    """whether values are normed too, each head by itself and without a weight"""
    fused: bool = False
    """whether queries, keys and values are one tensor of the checkpoint"""
    has_sinks: bool = False
    """whether the checkpoint has a sink for each head (`ScoreParams.sinks`)"""


class Attention(Module):
    """Writes the step's keys and values; returns only the rows that are read."""

    sinks: torch.Tensor | None = None
    """float32 [Hq]"""

    def __init__(self, build: Build, shape: AttentionShape) -> None:
        self._shape = shape
        if self._norms_projections:
            # its norms go over all heads
            build = replace(build, parallel=build.parallel.whole)
        self._own = own = build.parallel.own_heads(shape.heads)
        self.heads = own.layout
        """of this rank"""
        head_dim = self.heads.head_dim
        queries, keys = self.heads.num_heads * head_dim, self.heads.num_kv_heads * head_dim
        parts = {"q_proj": queries} | dict.fromkeys(("k_proj", "v_proj")[: self.heads.kv_parts], keys)
        if shape.fused:
            parts = {"qkv_proj": self.heads.qkv_width}
        order = head_order(shape.rope)
        self.qkv_proj = HeadsLinear(build, parts, shape.hidden_size, bias=shape.qkv_bias, role="qkv")
        if self.heads != shape.heads:
            self._take_own_heads()
        if order is not None:
            self.qkv_proj.reorder(order, self.heads.num_heads + self.heads.num_kv_heads)
        assert order is None or not (self._norms_projections or shape.heads.kv_parts < 2)
        self.q_norm = self.k_norm = None
        if shape.qk_norm_eps is not None:
            widths = (queries, keys) if self._norms_projections else (head_dim, head_dim)
            self.q_norm = shape.qk_norm(widths[0], shape.qk_norm_eps, order)
            if shape.heads.kv_parts:
                self.k_norm = shape.qk_norm(widths[1], shape.qk_norm_eps, order)
        self.o_proj = RowParallelLinear(
            build, {"o_proj": shape.hidden_size}, shape.heads.num_heads * head_dim, bias=shape.o_bias, unit=head_dim
        )

    def _take_own_heads(self) -> None:
        """Read the rows of this rank's heads."""
        whole, own = self._shape.heads, self._own
        queries, keys = _rows_of(own.queries, whole.head_dim), _rows_of(own.keys, whole.head_dim)
        num_queries, num_keys = whole.num_heads * whole.head_dim, whole.num_kv_heads * whole.head_dim
        if self._shape.fused:
            starts = [num_queries + part * num_keys for part in range(whole.kv_parts)]
            rows = torch.cat([queries, *(start + keys for start in starts)])
            self.qkv_proj.take("qkv_proj", rows, of=whole.qkv_width)
            return
        self.qkv_proj.take("q_proj", queries, of=num_queries)
        for part in ("k_proj", "v_proj")[: whole.kv_parts]:
            self.qkv_proj.take(part, keys, of=num_keys)

    @property
    def has_sinks(self) -> bool:
        """Whether each head has a sink."""
        return self._shape.has_sinks

    @property
    def _norms_projections(self) -> bool:
        return issubclass(self._shape.qk_norm, ProjectionNorm)

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        if self._shape.has_sinks:
            yield path + ".sinks", Parameter((self._shape.heads.num_heads,))

    def load(self, path: str, tensors: Tensors) -> None:
        if self._shape.has_sinks:
            own = self._own.queries
            self.sinks = tensors.read(path + ".sinks")[own.start : own.stop].to(torch.float32, copy=True)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        if self.sinks is not None:
            yield self.sinks

    def allocate(self, scratch: Scratch) -> None:
        self._scores = replace(self._shape.scores, sinks=self.sinks)
        self._table = scratch.rope_table(self._shape.rope)
        self._norms = None
        if self.q_norm is not None:
            keys = None if self.k_norm is None else self.k_norm.weight
            self._norms = HeadNorms(self.q_norm.weight, keys, self.q_norm.eps, self._shape.v_norm)
        self._attended = scratch.rows("attended", self.o_proj.in_features)
        self._workspace = scratch.workspace

    def shape(self) -> tuple[object, ...]:
        return (self._shape, self.heads)

    def __call__(self, x: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor:
        """[T, H] → [S, H]"""
        return self.o_proj(self.attend(x, step, cache))

    def unsummed(self, x: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor | Unsummed:
        """The same, for the norm that is next."""
        return self.o_proj.unsummed(self.attend(x, step, cache))

    def attend(self, x: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor:
        """[T, H] → [S, Hq D], before the last projection."""
        return self.attend_rows(self.qkv_proj(x), step, cache)

    def attend_rows(self, rows: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor:
        """The same of queries, keys and values [T, (Hq + P Hkv) D], which are overwritten."""
        qkv, heads, batch, read, norms = rows, self.heads, step.batch, step.outputs, self._norms
        if norms is not None and norms.k is not None and self._norms_projections:
            rms_norm_of_parts(qkv, norms.q, norms.k, norms.eps)
            norms = None
        rope_and_cache_write(qkv, step.positions, self._table, step.slot_mapping, cache, heads, norms)
        if read is not None:
            qkv = qkv.index_select(0, read.rows)
            batch = batch_of_rows_read(batch, read)
        attended = self._attended.first(qkv.shape[0])
        paged_attention(qkv, cache, batch, heads, self._scores, attended, self._workspace)
        return attended


def _rows_of(heads: range, head_dim: int) -> torch.Tensor:
    """The rows of some heads in a projection."""
    return torch.arange(heads.start * head_dim, heads.stop * head_dim, dtype=torch.int64, device="cpu")


class GatedAttention(Attention):
    """Each head's result is multiplied by the sigmoid of a gate, whose matrix lies beside the head's queries."""

    def __init__(self, build: Build, shape: AttentionShape) -> None:
        super().__init__(build, shape)
        num_heads, head_dim, own = shape.heads.num_heads, shape.heads.head_dim, self._own.queries
        width = 2 * num_heads * head_dim
        rows = torch.arange(width, dtype=torch.int64, device="cpu").view(num_heads, 2, head_dim)
        rows = rows[own.start : own.stop]
        self.qkv_proj.take("q_proj", rows[:, 0].reshape(-1), of=width)
        queries = {"q_proj": len(own) * head_dim}
        self.gate_proj = Linear(build, queries, shape.hidden_size, bias=shape.qkv_bias, role="gates")
        self.gate_proj.take("q_proj", rows[:, 1].reshape(-1), of=width)

    def __call__(self, x: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor:
        """[T, H] → [S, H]"""
        attended = self.attend(x, step, cache)
        read = x if step.outputs is None else x.index_select(0, step.outputs.rows)
        return self.o_proj(gate(attended, self.gate_proj(read)))
