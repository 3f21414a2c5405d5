"""Qwen3-MoE: Qwen3's block with a mixture of experts for its feed-forward branch.

Yang et al. 2025 (arXiv 2505.09388).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from sempre.kernels.moe import ExpertShape
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
    width,
)
from sempre.workers.models.llama import gated_mlp, model_with

RULES = FamilyRules(qkv_bias=BiasRule.ATTENTION_BIAS, o_bias=BiasRule.ATTENTION_BIAS, qk_norm=True)

MAX_EXPERTS = 4096


@dataclass(frozen=True)
class Qwen3MoeSpec(ModelSpec):
    """`intermediate_size` is that of the layers without experts."""

    num_experts: int
    experts_per_token: int
    expert_size: int
    """intermediate size of an expert"""
    renormalize: bool
    """whether the weights of a row's experts add up to one"""
    sparse_layers: tuple[int, ...]
    """layers with experts"""

    def one_layer_per_kind(self) -> Self:
        sparse = tuple(dict.fromkeys(layer in self.sparse_layers for layer in range(self.num_layers)))
        layers = tuple(layer for layer, is_sparse in enumerate(sparse) if is_sparse)
        return replace(self, num_layers=len(sparse), windows=self.windows[: len(sparse)], sparse_layers=layers)


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Qwen3MoeSpec:
    """Raises ModelError naming the field."""
    refuse_other_activation(config, "silu")
    if config.boolean("use_sliding_window", default=False):
        config.fail("use_sliding_window", "false for this architecture", True)
    common = parse_decoder(architecture, RULES, config, generation)
    name = "num_experts" if config.raw.get("num_experts") is not None else "num_local_experts"
    num_experts = config.positive(name, default=128, most=MAX_EXPERTS)
    experts_per_token = config.positive("num_experts_per_tok", default=8)
    if experts_per_token > num_experts:
        config.fail("num_experts_per_tok", f"at most {name}={num_experts}", experts_per_token)
    return extended(
        common,
        Qwen3MoeSpec,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_size=width("moe_intermediate_size", config, default=768),
        renormalize=config.boolean("norm_topk_prob", default=False),
        sparse_layers=_sparse_layers(config, common.num_layers),
    )


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Qwen3MoeSpec)
    return model_with(build, spec, lambda layer: _mlp(build, spec, layer))


def _mlp(build: Build, spec: Qwen3MoeSpec, layer: int) -> GatedMLP | SparseMLP:
    if layer not in spec.sparse_layers:
        return gated_mlp(build, spec)
    shape = ExpertShape(spec.num_experts, spec.experts_per_token, spec.hidden_size, spec.expert_size)
    return SparseMLP(build, shape, renormalize=spec.renormalize)


def _sparse_layers(config: ConfigFields, num_layers: int) -> tuple[int, ...]:
    step = config.positive("decoder_sparse_step", default=1)
    dense = config.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        config.fail("mlp_only_layers", "a list of layers", dense)
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
