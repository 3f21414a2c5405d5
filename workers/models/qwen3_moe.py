"""Qwen3-MoE: Qwen3's block with a mixture of experts for its feed-forward branch.

Yang et al. 2025 (arXiv 2505.09388).
"""

from __future__ import annotations

from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build
from sempre.workers.layers.moe import SparseMLP
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import gated_mlp, model_with
from sempre.workers.models.moe import MoeSpec, layers_by_step, parse_experts, refuse_windows

RULES = FamilyRules(qkv_bias=BiasRule.ATTENTION_BIAS, o_bias=BiasRule.ATTENTION_BIAS, qk_norm=True)
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> MoeSpec:
    """Raises ModelError naming the field."""
    # transformers takes either name
    count = "num_experts" if config.raw.get("num_local_experts") is None else "num_local_experts"
    config = with_defaults(config, {**DEFAULTS, count: 128})
    refuse_other_activation(config, "silu")
    refuse_windows(config)
    common = parse_decoder(architecture, RULES, config, generation)
    return extended(
        common,
        MoeSpec,
        **parse_experts(config, count, "moe_intermediate_size"),
        renormalize=config.boolean("norm_topk_prob", default=False),
        sparse_layers=layers_by_step(config, common.num_layers),
    )


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, MoeSpec)
    return model_with(build, spec, lambda layer: _mlp(build, spec, layer))


def _mlp(build: Build, spec: MoeSpec, layer: int) -> GatedMLP | SparseMLP:
    if layer not in spec.sparse_layers:
        return gated_mlp(build, spec)
    return SparseMLP(build, spec.expert_shape, renormalize=spec.renormalize)
