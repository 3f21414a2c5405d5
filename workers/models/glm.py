"""GLM-4: Llama's block whose heads turn in part, by neighbouring pairs; since 0414 with norms after each branch too.

GLM team 2024 (arXiv 2406.12793).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sempre.kernels.attention import KvCache
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.models.base import Branch, CausalLM
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import LlamaBlock, attention_shape, model_of
from sempre.workers.models.rope_config import PARTIAL, rope_of_part
from sempre.workers.steps import StepInput, rows_read

RULES = FamilyRules(qkv_bias=BiasRule.ATTENTION_BIAS)
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> ModelSpec:
    """Raises ModelError naming the field."""
    # here null says nothing of it
    if config.raw.get("eos_token_id") is None:
        config = ConfigFields({name: value for name, value in config.raw.items() if name != "eos_token_id"})
    return parse_turning(architecture, RULES, with_defaults(config, DEFAULTS), generation, interleaved=True)


def parse_turning(
    architecture: str, rules: FamilyRules, config: ConfigFields, generation: ConfigFields, *, interleaved: bool
) -> ModelSpec:
    """`parse_decoder` of a family whose heads turn in part, by half where the config does not say."""
    refuse_other_activation(config, "silu")
    if config.raw.get(PARTIAL) is None:
        config = ConfigFields({**config.raw, PARTIAL: 0.5})
    common = parse_decoder(architecture, replace(rules, rope=rope_of_part), config, generation)
    return replace(common, rope=replace(common.rope, interleaved=interleaved))


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    block = {"GlmForCausalLM": GlmBlock, "Glm4ForCausalLM": Glm4Block}[spec.architecture]
    return model_of(build, spec, lambda layer: block(build, spec, layer))


class GlmBlock(LlamaBlock):
    def __init__(self, build: Build, spec: ModelSpec, layer: int) -> None:
        mlp = GatedMLP(build, spec.hidden_size, spec.intermediate_size, fused=True)
        super().__init__(spec, Attention(build, attention_shape(spec, layer)), mlp)


class Glm4Block(GlmBlock):
    """Each branch is normed before it is computed and before it is added."""

    def __init__(self, build: Build, spec: ModelSpec, layer: int) -> None:
        super().__init__(build, spec, layer)
        self.post_self_attn_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, role="branch norm")
        self.post_mlp_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, role="branch norm")

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: KvCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended = self.self_attn(self.input_layernorm.of_sum(branch, residual), step, cache)
        residual = rows_read(residual, step)
        branch = self.post_self_attn_layernorm(attended)
        branch = self.mlp(self.post_attention_layernorm.of_sum(branch, residual))
        return self.post_mlp_layernorm(branch), residual
