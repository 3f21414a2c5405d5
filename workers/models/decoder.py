"""The one forward pass of every dense decoder family, over the tokens of one step.

# T tokens in the step, R requests, H hidden size, I intermediate size, V vocabulary
# Hq query heads, Hkv key-value heads, D head dimension
The residual stream and all activations are float32 on the CPU and in the model's dtype on a GPU; logits are float32.
Every operation works on one row at a time as far as the result is concerned, so a row's bits depend on its own request
only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.kernels.attention import AttentionWorkspace, KvCache, paged_attention
from sempre.kernels.embedding import embed
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.norms import add_rms_norm, rms_norm
from sempre.kernels.rope import cos_sin_table, rope_and_cache_write
from sempre.workers.models.numerics import LinearKernel, Packed
from sempre.workers.models.spec import ModelSpec


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm weights are float32 on the CPU, in the model's dtype on a GPU."""

    input_norm: torch.Tensor
    qkv: Packed
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Packed
    post_attention_norm: torch.Tensor
    gate_up: Packed
    down: Packed


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder, with the digest of the tensors they were made of."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: Packed
    dtype: torch.dtype
    """what the engine's `dtype` came to: the KV cache's storage"""
    storage: torch.dtype
    """how the matrices that are not fp8 are stored"""
    quantization: Fp8Scheme | None
    """of the matrices that are fp8, if any are"""
    digest: str
    """SHA-256 of names, shapes, dtypes and bytes in the checkpoint; how it is cut into files does not matter"""

    @property
    def activations(self) -> torch.dtype:
        """The dtype of hidden states."""
        return torch.float32 if self.embedding.device.type == "cpu" else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices and the embedding."""
        packed = sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return packed + self.lm_head.nbytes + self.embedding.nbytes


@dataclass(frozen=True)
class OutputRows:
    """The rows whose final hidden states are wanted: S of a step's T, the last ones of each request, in order."""

    rows: torch.Tensor
    """int64 [S]"""
    starts: torch.Tensor
    """int32 [R + 1]: entries [starts[r], starts[r + 1]) belong to request r, which may have none"""
    max_per_request: int


@dataclass(frozen=True)
class StepInput:
    """The arrays of one step; rows of one request are neighbours, requests in the order of the step."""

    token_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T], absolute in the sequence"""
    slot_mapping: torch.Tensor
    """int64 [T]: block id * block_size + offset, where the token's keys and values are written"""
    block_tables: torch.Tensor
    """int32 [R, blocks]; entries past a request's context are not read"""
    query_starts: torch.Tensor
    """int32 [R + 1]: rows [query_starts[r], query_starts[r + 1]) belong to request r"""
    context_lens: torch.Tensor
    """int32 [R]: keys visible to the last row of request r"""
    max_query_len: int
    """no request has more rows; 1: row r belongs to request r"""
    max_context_len: int
    """no context is longer; this bound and the one above choose grids on a GPU and cannot be seen in the result"""
    outputs: OutputRows | None = None
    """None: all rows"""


class Decoder:
    """Weights and the buffers of a step of at most `max_tokens` rows, on the weights' device."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        product: LinearKernel,
        *,
        max_tokens: int,
        max_model_len: int,
        workspace: AttentionWorkspace | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        device = weights.embedding.device
        self._product = product
        self._scale = spec.head_dim**-0.5
        self._workspace = workspace
        self._cos_sin = cos_sin_table(spec.rope, max_model_len).to(device)

        def rows(width: int) -> torch.Tensor:
            return torch.empty(max_tokens, width, dtype=weights.activations, device=device)

        self._residual_TH = rows(spec.hidden_size)
        self._hidden_TH = rows(spec.hidden_size)
        self._branch_TH = rows(spec.hidden_size)
        self._qkv = rows(spec.qkv_size)
        self._attended = rows(spec.num_heads * spec.head_dim)
        self._gate_up = rows(2 * spec.intermediate_size)
        self._activated = rows(spec.intermediate_size)

    def forward(self, step: StepInput, caches: list[KvCache]) -> torch.Tensor:
        """Write the step's keys and values into `caches` (one per layer); return the final hidden states.

        Those of the rows in `step.outputs` [S, H], or of all rows [T, H]: a view of a buffer that the next call
        overwrites.
        """
        num_tokens, last = step.token_ids.shape[0], len(caches) - 1
        residual, hidden, branch = (
            buffer[:num_tokens] for buffer in (self._residual_TH, self._hidden_TH, self._branch_TH)
        )
        eps = self.spec.rms_norm_eps
        embed(step.token_ids, self.weights.embedding, residual)
        for index, (layer, cache) in enumerate(zip(self.weights.layers, caches, strict=True)):
            if index == 0:
                rms_norm(residual, layer.input_norm, eps, hidden)
            else:
                add_rms_norm(branch, residual, layer.input_norm, eps, hidden)
            qkv, starts, most = self._queries(layer, step, cache, hidden), step.query_starts, step.max_query_len
            if step.outputs is not None and index == last:
                # nothing reads the other rows once the last keys and values are in the cache
                rows, starts, most = step.outputs.rows, step.outputs.starts, step.outputs.max_per_request
                qkv, residual = qkv.index_select(0, rows), residual.index_select(0, rows)
                hidden, branch = hidden[: rows.shape[0]], branch[: rows.shape[0]]
                if not rows.shape[0]:
                    return hidden
            self._attention(layer, step, cache, self.spec.windows[index], qkv, starts, most, branch)
            add_rms_norm(branch, residual, layer.post_attention_norm, eps, hidden)
            self._mlp(layer, hidden, branch)
        add_rms_norm(branch, residual, self.weights.final_norm, eps, hidden)
        return hidden

    def logits(self, hidden_RH: torch.Tensor, out_RV: torch.Tensor) -> torch.Tensor:
        """Logits of the given final hidden states, written to and returned as `out_RV`."""
        return self._product.apply(hidden_RH, self.weights.lm_head, out_RV)

    def _queries(self, layer: LayerWeights, step: StepInput, cache: KvCache, hidden: torch.Tensor) -> torch.Tensor:
        """The rotated queries, in the rows of the fused product [T, (Hq + 2 Hkv) D]; keys and values are written."""
        qkv = self._product.apply(hidden, layer.qkv, self._qkv[: hidden.shape[0]])
        rotate_and_write(
            self.spec,
            qkv,
            step.positions,
            self._cos_sin,
            step.slot_mapping,
            cache,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
        return qkv

    def _attention(
        self,
        layer: LayerWeights,
        step: StepInput,
        cache: KvCache,
        window: int | None,
        qkv: torch.Tensor,
        query_starts: torch.Tensor,
        max_query_len: int,
        out: torch.Tensor,
    ) -> None:
        spec = self.spec
        attended = self._attended[: qkv.shape[0]]
        paged_attention(
            qkv,
            cache,
            step.block_tables,
            query_starts,
            step.context_lens,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=self._scale,
            window=window,
            out=attended,
            max_query_len=max_query_len,
            max_context_len=step.max_context_len,
            workspace=self._workspace,
        )
        self._product.apply(attended, layer.o, out)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        num_tokens = hidden.shape[0]
        gate_up, activated = self._gate_up[:num_tokens], self._activated[:num_tokens]
        self._product.apply_gated(hidden, layer.gate_up, gate_up, activated)
        self._product.apply(activated, layer.down, out)


def rotate_and_write(
    spec: ModelSpec,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: KvCache,
    *,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    """`rope_and_cache_write` on qkv [T, (Hq + 2 Hkv) D] and one layer's cache; positions and slots int64 [T]."""
    rope_and_cache_write(
        qkv,
        positions,
        table,
        slot_mapping,
        cache.k,
        cache.v,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=spec.rms_norm_eps,
    )
