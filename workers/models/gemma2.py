"""Gemma 2: norms before and after each branch, soft caps, a sliding window in every other layer (arXiv 2408.00118)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sempre.kernels.activation import Activation, soft_cap
from sempre.kernels.attention import KvCache, ScoreParams
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention, AttentionShape
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build, Module, Scratch
from sempre.workers.layers.norm import OffsetRMSNorm
from sempre.workers.models.base import Branch, CausalLM, Stack
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    WindowRule,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import attention_shape
from sempre.workers.steps import StepInput, rows_read

RULES = FamilyRules(
    qkv_bias=BiasRule.ATTENTION_BIAS,
    o_bias=BiasRule.ATTENTION_BIAS,
    window=WindowRule.EVERY_OTHER_LAYER,
)
DEFAULTS: dict[str, object] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class GemmaSpec(ModelSpec):
    """Also of Gemma 3. Caps of None are off."""

    query_scale: float
    """of the scores"""
    attention_cap: float | None
    logit_cap: float | None


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> GemmaSpec:
    """Raises ModelError naming the field."""
    # hidden_act in older files names an activation that the family does not use
    refuse_other_activation(config, "gelu_pytorch_tanh", "hidden_activation")
    if config.boolean("use_bidirectional_attention", default=False):
        config.fail("use_bidirectional_attention", "false", True)
    config = with_defaults(config, DEFAULTS)
    common = parse_decoder(architecture, RULES, config, generation)
    return extended(
        common,
        GemmaSpec,
        query_scale=config.positive_number("query_pre_attn_scalar", default=256.0) ** -0.5,
        attention_cap=parse_cap(config, "attn_logit_softcapping", 50.0),
        logit_cap=parse_cap(config, "final_logit_softcapping", 30.0),
    )


def parse_cap(config: ConfigFields, name: str, default: float | None) -> float | None:
    """`default` when the field is absent, none when it is null."""
    if config.raw.get(name) is None and (name in config.raw or default is None):
        return None
    return config.positive_number(name, default=default)


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, GemmaSpec)
    return gemma_model(build, spec, lambda layer: gemma_attention_shape(spec, layer))


def gemma_model(build: Build, spec: GemmaSpec, shape_of: Callable[[int], AttentionShape]) -> CausalLM:
    """The tree whose layers have this attention."""
    blocks = [GemmaBlock(build, spec, shape_of(layer)) for layer in range(spec.num_layers)]
    stack = ScaledStack(Embedding(build, spec.vocab_size, spec.hidden_size), blocks, _norm(spec))
    return CappedLM(build, spec, stack) if spec.logit_cap is not None else CausalLM(build, spec, stack)


def gemma_attention_shape(spec: GemmaSpec, layer: int) -> AttentionShape:
    """That of one layer."""
    scores = ScoreParams(spec.query_scale, spec.windows[layer], spec.attention_cap)
    return replace(attention_shape(spec, layer), scores=scores)


def _norm(spec: ModelSpec, role: str = "normed") -> OffsetRMSNorm:
    return OffsetRMSNorm(spec.hidden_size, spec.rms_norm_eps, role=role)


class GemmaBlock(Module):
    """Each branch is normed before it is computed and before it is added."""

    def __init__(self, build: Build, spec: GemmaSpec, shape: AttentionShape) -> None:
        self.input_layernorm = _norm(spec)
        self.self_attn = Attention(build, shape)
        self.post_attention_layernorm = _norm(spec, "branch norm")
        self.pre_feedforward_layernorm = _norm(spec)
        self.mlp = GatedMLP(build, spec.hidden_size, spec.intermediate_size, activation=Activation.GELU)
        self.post_feedforward_layernorm = _norm(spec, "branch norm")

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: KvCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended = self.self_attn(self.input_layernorm.of_sum(branch, residual), step, cache)
        residual = rows_read(residual, step)
        branch = self.post_attention_layernorm(attended)
        branch = self.mlp(self.pre_feedforward_layernorm.of_sum(branch, residual))
        return self.post_feedforward_layernorm(branch), residual


class ScaledStack(Stack):
    """Embeddings times the square root of their width, rounded to their dtype."""

    def allocate(self, scratch: Scratch) -> None:
        self._scale = torch.tensor(self.embed_tokens.width**0.5, dtype=scratch.activations, device="cpu").item()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(token_ids).mul_(self._scale)


class CappedLM(CausalLM):
    """Logits are cap * tanh(logit / cap)."""

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.spec, GemmaSpec)
        assert self.spec.logit_cap is not None
        return soft_cap(super().logits(hidden, out), self.spec.logit_cap)
