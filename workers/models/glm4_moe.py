"""GLM-4.5: heads that turn in part, and after the first layers experts by sigmoid scores, with one for every row.

GLM-4.5 team 2025 (arXiv 2508.06471). Layers that predict more tokens at once are in checkpoints, and are not read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sempre.kernels.moe import add_shared
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build
from sempre.workers.layers.moe import ExpertChoice, SparseMLP
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import BiasRule, FamilyRules, ModelSpec, extended, with_defaults
from sempre.workers.models.glm import parse_turning
from sempre.workers.models.llama import gated_mlp, model_with
from sempre.workers.models.moe import MoeSpec, parse_experts

RULES = FamilyRules(qkv_bias=BiasRule.ATTENTION_BIAS)
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
}


@dataclass(frozen=True)
class Glm4MoeSpec(MoeSpec):
    choice: ExpertChoice
    shared_size: int
    """intermediate size of the expert of every row"""
    num_unread_layers: int
    """after the last one"""


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Glm4MoeSpec:
    """Raises ModelError naming the field."""
    config = with_defaults(config, DEFAULTS)
    common = parse_turning(architecture, RULES, config, generation, interleaved=False)
    experts = parse_experts(config, "n_routed_experts", "moe_intermediate_size")
    first = config.natural("first_k_dense_replace", default=1)
    return extended(
        replace(common, qk_norm=config.boolean("use_qk_norm", default=False)),
        Glm4MoeSpec,
        **experts,
        renormalize=config.boolean("norm_topk_prob", default=True),
        sparse_layers=tuple(range(first, common.num_layers)),
        choice=_choice(config, experts["num_experts"], experts["experts_per_token"]),
        shared_size=experts["expert_size"] * config.positive("n_shared_experts", default=1),
        num_unread_layers=config.natural("num_nextn_predict_layers", default=1),
    )


def _choice(config: ConfigFields, num_experts: int, experts_per_token: int) -> ExpertChoice:
    groups = config.positive("n_group", default=1)
    kept = config.positive("topk_group", default=1)
    # a group's rank is that of its two best experts
    if num_experts % groups or num_experts // groups < 2:
        config.fail("n_group", f"equal groups of at least two of n_routed_experts={num_experts}", groups)
    if kept > groups:
        config.fail("topk_group", f"at most n_group={groups}", kept)
    if experts_per_token > num_experts // groups * kept:
        config.fail("num_experts_per_tok", "at most the experts of topk_group groups", experts_per_token)
    return ExpertChoice(groups, kept, config.positive_number("routed_scaling_factor", default=1.0))


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Glm4MoeSpec)
    model = model_with(build, spec, lambda layer: _mlp(build, spec, layer))
    after = range(spec.num_layers, spec.num_layers + spec.num_unread_layers)
    model.unread = tuple(f"model.layers.{layer}." for layer in after)
    return model


def _mlp(build: Build, spec: Glm4MoeSpec, layer: int) -> GatedMLP | SparseMLP:
    return GlmSparseMLP(build, spec) if layer in spec.sparse_layers else gated_mlp(build, spec)


class GlmSparseMLP(SparseMLP):
    """The chosen experts, then that of every row."""

    def __init__(self, build: Build, spec: Glm4MoeSpec) -> None:
        super().__init__(build, spec.expert_shape, renormalize=spec.renormalize, choice=spec.choice)
        self.shared_experts = GatedMLP(build, spec.hidden_size, spec.shared_size, role="shared")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return add_shared(super().__call__(x), self.shared_experts(x))
