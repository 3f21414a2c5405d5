"""Llama, Mistral, Qwen2 and Qwen3: norm and attention, norm and gated feed-forward, each added to the residual stream.

Touvron et al. 2023 (arXiv 2302.13971); Jiang et al. 2023 (arXiv 2310.06825); Yang et al. 2024 (arXiv 2407.10671) and
2025 (arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sempre.kernels.attention import HeadLayout, KvCache, ScoreParams
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention, AttentionShape
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build, Module
from sempre.workers.layers.moe import SparseMLP
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.models.base import Block, Branch, CausalLM, Stack
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    WindowRule,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.multimodal import TEXT_PART, text_part
from sempre.workers.steps import StepInput, rows_read

MULTIMODAL = "Mistral3ForConditionalGeneration"
RULES = {
    "LlamaForCausalLM": FamilyRules(
        qkv_bias=BiasRule.ATTENTION_BIAS, o_bias=BiasRule.ATTENTION_BIAS, mlp_bias=BiasRule.MLP_BIAS
    ),
    "MistralForCausalLM": FamilyRules(window=WindowRule.EVERY_LAYER),
    MULTIMODAL: FamilyRules(window=WindowRule.EVERY_LAYER),
    "Qwen2ForCausalLM": FamilyRules(qkv_bias=BiasRule.ALWAYS, window=WindowRule.UPPER_LAYERS),
    "Qwen3ForCausalLM": FamilyRules(
        qkv_bias=BiasRule.ATTENTION_BIAS,
        o_bias=BiasRule.ATTENTION_BIAS,
        window=WindowRule.UPPER_LAYERS,
        qk_norm=True,
    ),
}
COMMON_DEFAULTS: dict[str, object] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_DEFAULTS: dict[str, object] = {
    **COMMON_DEFAULTS,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
MISTRAL_DEFAULTS: dict[str, object] = {
    **COMMON_DEFAULTS,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "eos_token_id": 2,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS: dict[str, object] = {
    **COMMON_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, object]] = {
    "LlamaForCausalLM": LLAMA_DEFAULTS,
    "MistralForCausalLM": MISTRAL_DEFAULTS,
    MULTIMODAL: MISTRAL_DEFAULTS,
    "Qwen2ForCausalLM": QWEN2_DEFAULTS,
    "Qwen3ForCausalLM": {**QWEN2_DEFAULTS, "head_dim": 128},
}


def parse(architecture: str, fields: ConfigFields, generation: ConfigFields) -> ModelSpec:
    """Raises ModelError naming the field."""
    if architecture == MULTIMODAL:
        fields = text_part(fields, tied_by_default=True)
        if fields.raw.get("model_type", "mistral") != "mistral":
            fields.fail("model_type", "'mistral'", fields.raw["model_type"])
    nullable = () if DEFAULTS[architecture] is MISTRAL_DEFAULTS else ("num_key_value_heads",)
    fields = with_defaults(fields, DEFAULTS[architecture], nullable)
    refuse_other_activation(fields, "silu")
    return parse_decoder(architecture, RULES[architecture], fields, generation)


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    model = model_with(build, spec, lambda layer: gated_mlp(build, spec))
    if spec.architecture == MULTIMODAL:
        model.part = TEXT_PART
    return model


def model_with(build: Build, spec: ModelSpec, mlp_of: Callable[[int], GatedMLP | SparseMLP]) -> CausalLM:
    """The tree with these feed-forward branches in its layers."""

    def block(layer: int) -> LlamaBlock:
        return LlamaBlock(spec, Attention(build, attention_shape(spec, layer)), mlp_of(layer))

    return model_of(build, spec, block)


def model_of(build: Build, spec: ModelSpec, block_of: Callable[[int], Block]) -> CausalLM:
    """The tree of these blocks."""
    blocks = [block_of(layer) for layer in range(spec.num_layers)]
    norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    return CausalLM(build, spec, Stack(Embedding(build, spec.vocab_size, spec.hidden_size), blocks, norm))


def attention_shape(spec: ModelSpec, layer: int) -> AttentionShape:
    """The shape of one layer."""
    return AttentionShape(
        hidden_size=spec.hidden_size,
        heads=HeadLayout(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        scores=ScoreParams(spec.head_dim**-0.5, spec.windows[layer]),
        rope=spec.rope,
        qkv_bias=spec.qkv_bias,
        o_bias=spec.o_bias,
        qk_norm_eps=spec.rms_norm_eps if spec.qk_norm else None,
    )


def gated_mlp(build: Build, spec: ModelSpec) -> GatedMLP:
    return GatedMLP(build, spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)


class LlamaBlock(Module):
    """Also for families with another feed-forward branch."""

    def __init__(self, spec: ModelSpec, self_attn: Attention, mlp: GatedMLP | SparseMLP) -> None:
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = mlp

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: KvCache
    ) -> tuple[Branch, torch.Tensor]:
        attended = self.self_attn.unsummed(self.input_layernorm.of_sum(branch, residual), step, cache)
        residual = rows_read(residual, step)
        x = self.post_attention_layernorm.of_sum(attended, residual)
        return self.mlp.unsummed(x) if isinstance(self.mlp, GatedMLP) else self.mlp(x), residual
