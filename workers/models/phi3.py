"""Phi-3 and Phi-4: Llama's block, with fused tensors in the checkpoint; the heads of Phi-4 mini turn in part.

Abdin et al. 2024 (arXiv 2404.14219).
"""

from __future__ import annotations

from dataclasses import replace

from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import (
    FamilyRules,
    ModelSpec,
    WindowRule,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import LlamaBlock, attention_shape, model_of
from sempre.workers.models.rope_config import rope_of_part

RULES = FamilyRules(window=WindowRule.EVERY_LAYER, rope=rope_of_part)
DEFAULTS: dict[str, object] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 32000,
}


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> ModelSpec:
    """Raises ModelError naming the field."""
    refuse_other_activation(config, "silu")
    return parse_decoder(architecture, RULES, with_defaults(config, DEFAULTS), generation)


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""

    def block(layer: int) -> LlamaBlock:
        attention = Attention(build, replace(attention_shape(spec, layer), fused=True))
        return LlamaBlock(spec, attention, GatedMLP(build, spec.hidden_size, spec.intermediate_size, fused=True))

    return model_of(build, spec, block)
