"""Qwen2-MoE: Qwen2's block with a mixture of experts, and with one more for every row, as strong as a gate says.

Yang et al. 2024 (arXiv 2407.10671).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sempre.kernels.moe import add_shared
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build
from sempre.workers.layers.moe import Router, SparseMLP
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    extended,
    parse_decoder,
    refuse_other_activation,
    width,
    with_defaults,
)
from sempre.workers.models.llama import gated_mlp, model_with
from sempre.workers.models.moe import MoeSpec, layers_by_step, parse_experts, refuse_windows

RULES = FamilyRules(qkv_bias=BiasRule.QKV_BIAS)
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


@dataclass(frozen=True)
class Qwen2MoeSpec(MoeSpec):
    shared_size: int
    """intermediate size of the expert of every row"""


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Qwen2MoeSpec:
    """Raises ModelError naming the field."""
    config = with_defaults(config, DEFAULTS)
    refuse_other_activation(config, "silu")
    refuse_windows(config)
    common = parse_decoder(architecture, RULES, config, generation)
    return extended(
        common,
        Qwen2MoeSpec,
        **parse_with_shared(config, common.num_layers),
        renormalize=config.boolean("norm_topk_prob", default=False),
    )


def parse_with_shared(config: ConfigFields, num_layers: int) -> dict[str, Any]:
    """The fields of a Qwen2MoeSpec about experts, but for `renormalize`. Raises ModelError naming the field."""
    return {
        **parse_experts(config, "num_experts", "moe_intermediate_size"),
        "sparse_layers": layers_by_step(config, num_layers),
        "shared_size": width("shared_expert_intermediate_size", config),
    }


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Qwen2MoeSpec)
    return model_with(build, spec, lambda layer: _mlp(build, spec, layer))


def _mlp(build: Build, spec: Qwen2MoeSpec, layer: int) -> GatedMLP | SparseMLP:
    return Qwen2SparseMLP(build, spec) if layer in spec.sparse_layers else gated_mlp(build, spec)


class Qwen2SparseMLP(SparseMLP):
    """The chosen experts, then that of every row times the sigmoid of its gate."""

    def __init__(self, build: Build, spec: Qwen2MoeSpec) -> None:
        super().__init__(build, spec.expert_shape, renormalize=spec.renormalize)
        self.shared_expert = GatedMLP(build, spec.hidden_size, spec.shared_size, role="shared")
        self.shared_expert_gate = Router(build, "shared_expert_gate", 1, spec.hidden_size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return add_shared(super().__call__(x), self.shared_expert(x), self.shared_expert_gate(x))
