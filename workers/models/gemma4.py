"""Gemma 4, the text part (Google DeepMind 2026).

Gemma 3's sandwich of norms. Layers that see all keys have heads of their own, whose keys may be their values; the last
layers read the keys and values of earlier ones; a small embedding of the token for each layer is added at its end;
there may be a mixture of experts beside the feed-forward branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from sempre.kernels.activation import Activation, gelu_mul
from sempre.kernels.attention import HeadLayout, KvCache, ScoreParams
from sempre.kernels.moe import ExpertShape
from sempre.kernels.norms import rms_norm
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.layers.moe import Router, SparseMLP, experts_by_name
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.models.base import Branch, CausalLM
from sempre.workers.models.config import ModelSpec
from sempre.workers.models.gemma2 import CappedLM, ScaledStack
from sempre.workers.models.gemma4_config import MULTIMODAL, Gemma4Spec, parse
from sempre.workers.models.llama import attention_shape
from sempre.workers.models.multimodal import TEXT_PART
from sempre.workers.stages import Stage
from sempre.workers.steps import StepInput, of_rows_read, rows_read
from sempre.workers.tensor_source import Parameter

__all__ = ["build_model", "parse"]


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Gemma4Spec)
    blocks = [Gemma4Block(build, spec, layer) for layer in range(spec.num_layers)]
    stack = Gemma4Stack(build, spec, blocks)
    model = CappedLM(build, spec, stack) if spec.logit_cap is not None else CausalLM(build, spec, stack)
    if spec.architecture in MULTIMODAL:
        model.part = TEXT_PART
    model.may_stack_experts = spec.experts is not None
    readers = [layer for layer, source in enumerate(spec.sources) if source is not None]
    # published files have them, though nothing reads them
    parts = ("k_proj", "v_proj", "k_norm", "v_norm")
    model.unread = tuple(f"model.layers.{layer}.self_attn.{part}." for layer in readers for part in parts)
    return model


def _attention(build: Build, spec: Gemma4Spec, layer: int) -> Attention:
    window, kv = spec.windows[layer], spec.kv_layers[layer]
    parts: Literal[0, 1, 2] = 1 if spec.keys_are_values and window is None else 2
    shape = replace(
        attention_shape(spec, layer),
        heads=HeadLayout(spec.num_heads, kv.num_kv_heads, kv.head_dim, parts if kv.source is None else 0),
        scores=ScoreParams(spec.query_scale, window),
        rope=spec.rope if window is None else spec.windowed_rope,
        v_norm=True,
    )
    return Attention(build, shape)


def _norm(spec: ModelSpec, role: str = "normed") -> RMSNorm:
    return RMSNorm(spec.hidden_size, spec.rms_norm_eps, role=role)


class Gemma4Block(Module):
    """Adds its own branches, since all that it returns is multiplied at the end."""

    scalar: torch.Tensor
    """[1]"""

    def __init__(self, build: Build, spec: Gemma4Spec, layer: int) -> None:
        self.reads_other = spec.sources[layer] is not None
        doubled = 2 if self.reads_other and spec.doubled_readers else 1
        self.input_layernorm = _norm(spec)
        self.self_attn = _attention(build, spec, layer)
        self.post_attention_layernorm = _norm(spec, "branch norm")
        self.pre_feedforward_layernorm = _norm(spec)
        self.mlp = GatedMLP(build, spec.hidden_size, spec.intermediate_size * doubled, activation=Activation.GELU)
        self.post_feedforward_layernorm = _norm(spec, "branch norm")
        self.router = None
        if spec.experts is not None:
            self.post_feedforward_layernorm_1 = _norm(spec, "dense norm")
            self.router = Gemma4Experts(build, spec, spec.experts)
            self.pre_feedforward_layernorm_2 = _norm(spec)
            self.post_feedforward_layernorm_2 = _norm(spec, "branch norm")
        self._layer = layer
        self._sizes = spec.per_layer
        if spec.per_layer is not None:
            gate = {"per_layer_input_gate": spec.per_layer.width}
            self.per_layer_input_gate = Linear(build, gate, spec.hidden_size, role="per layer gate")
            projection = {"per_layer_projection": spec.hidden_size}
            self.per_layer_projection = Linear(build, projection, spec.per_layer.width)
            self.post_per_layer_input_norm = _norm(spec, "branch norm")

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".layer_scalar", Parameter((1,), initial="ones")

    def load(self, path: str, tensors: Tensors) -> None:
        self.scalar = tensors.vector(path + ".layer_scalar")

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield self.scalar

    def allocate(self, scratch: Scratch) -> None:
        if self._sizes is not None:
            self._gated = scratch.rows("per layer gated", self._sizes.width)

    def __call__(
        self,
        branch: Branch | None,
        residual: torch.Tensor,
        step: StepInput,
        cache: KvCache,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`inputs` [S, width of a layer's embedding times layers]: what each layer gets of the rows that are read."""
        attended = self.self_attn(self.input_layernorm.of_sum(branch, residual), step, cache)
        residual = rows_read(residual, step)
        branch = self.post_attention_layernorm(attended)
        branch = self.mlp(self.pre_feedforward_layernorm.of_sum(branch, residual))
        if self.router is not None:
            dense = self.post_feedforward_layernorm_1(branch)
            mixed = self.router.of(residual, self.pre_feedforward_layernorm_2(residual))
            branch = dense.add_(self.post_feedforward_layernorm_2(mixed))
        residual.add_(self.post_feedforward_layernorm(branch))
        if inputs is not None and self._sizes is not None:
            start = self._layer * self._sizes.width
            own = inputs[:, start : start + self._sizes.width]
            gated = gelu_mul(self.per_layer_input_gate(residual), own, self._gated.first(own.shape[0]))
            residual.add_(self.post_per_layer_input_norm(self.per_layer_projection(gated)))
        return None, residual.mul_(self.scalar)


class Gemma4Experts(SparseMLP):
    """`router`: chooses by a norm of its own, and scales the experts' weights. Its experts lie beside it."""

    scale: torch.Tensor
    """float32 [H]: of the norm"""

    def __init__(self, build: Build, spec: Gemma4Spec, shape: ExpertShape) -> None:
        experts = experts_by_name(build, shape, activation=Activation.GELU)
        parts = Router(build, "proj", shape.num_experts, shape.hidden_size), experts
        super().__init__(build, shape, renormalize=True, parts=parts)
        self._eps = spec.rms_norm_eps

    def walk(self, path: str = "") -> Iterator[tuple[str, Module]]:
        yield from self.gate.walk(path + ".proj")
        yield from self.experts.walk(path.removesuffix("router") + "experts")
        yield path, self

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".scale", Parameter((self.sizes.hidden_size,), initial="ones")
        yield path + ".per_expert_scale", Parameter((self.sizes.num_experts,), initial="ones")

    def load(self, path: str, tensors: Tensors) -> None:
        self.scale = tensors.read(path + ".scale").to(torch.float32, copy=True) * self.sizes.hidden_size**-0.5
        self.factors = tensors.read(path + ".per_expert_scale").to(torch.float32, copy=True)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        assert self.factors is not None
        yield from (self.scale, self.factors)

    def allocate(self, scratch: Scratch) -> None:
        super().allocate(scratch)
        self._normed = scratch.rows("router normed", self.sizes.hidden_size)

    def of(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The experts' branch of x [T, H], by a choice that depends on the residual stream."""
        normed = rms_norm(residual, self.scale, self._eps, self._normed.first(residual.shape[0]))
        return self.mix(x, self.gate(normed))


class PerLayerNorm(RMSNorm):
    """Of the part of each layer, in place."""

    def allocate(self, scratch: Scratch) -> None:
        """Nothing: it has no rows of its own."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, L * width], contiguous"""
        parts = x.view(-1, self.width)
        rms_norm(parts, self.weight, self.eps, parts)
        return x


class Gemma4Stack(ScaledStack):
    """Once the last keys and values are cached, only the rows that are read go on."""

    def __init__(self, build: Build, spec: Gemma4Spec, blocks: Sequence[Gemma4Block]) -> None:
        super().__init__(Embedding(build, spec.vocab_size, spec.hidden_size), blocks, _norm(spec))
        self._sizes = spec.per_layer
        if spec.per_layer is not None:
            vocab, size, count = spec.per_layer
            self.embed_tokens_per_layer = Embedding(build, vocab, size * count, role="per layer ids")
            projection = {"per_layer_model_projection": size * count}
            self.per_layer_model_projection = Linear(build, projection, spec.hidden_size, role="per layer")
            self.per_layer_projection_norm = PerLayerNorm(size, spec.rms_norm_eps)

    def allocate(self, scratch: Scratch) -> None:
        super().allocate(scratch)
        if self._sizes is not None:
            scale = torch.tensor(self._sizes.width**0.5, dtype=scratch.activations, device="cpu")
            self._per_layer_scale = scale.item()

    def keep_stage(self, stage: Stage, *, keep_table: bool) -> None:
        """Raises ConfigError: later layers need the embeddings, or the keys and values, of earlier ones."""
        raise stage.refused("one stage for Gemma 4, whose later layers read what earlier ones do")

    def __call__(self, step: StepInput, caches: Sequence[Any]) -> torch.Tensor:
        residual, branch = self.embed(step.token_ids), None
        inputs = self._per_layer_inputs(residual, step.token_ids)
        blocks = [block for block in self.layers if isinstance(block, Gemma4Block)]
        last_writer = max(index for index, block in enumerate(blocks) if not block.reads_other)
        all_rows, rows_after = replace(step, outputs=None), of_rows_read(step)
        for index, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            if index == last_writer and inputs is not None:
                inputs = rows_read(inputs, step)
            of_block = all_rows if index < last_writer else step if index == last_writer else rows_after
            branch, residual = block(branch, residual, of_block, cache, inputs)
        return self.norm.of_sum(branch, residual)

    def _per_layer_inputs(self, embedded: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor | None:
        """[T, L * width]: what each layer gets of the tokens, by their embeddings in common and for it."""
        if self._sizes is None:
            return None
        projected = self.per_layer_model_projection(embedded).mul_(self.embed_tokens.width**-0.5)
        own = self.embed_tokens_per_layer(token_ids).mul_(self._per_layer_scale)
        return self.per_layer_projection_norm(projected).add_(own).mul_(2**-0.5)
