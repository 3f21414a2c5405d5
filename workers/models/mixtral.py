"""Mixtral: Mistral's block with a mixture of experts in every layer (Jiang et al. 2024, arXiv 2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator

from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.module import Build, Module
from sempre.workers.layers.moe import ExpertNames, SparseMLP
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import (
    FamilyRules,
    ModelSpec,
    WindowRule,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import LlamaBlock, attention_shape, model_of
from sempre.workers.models.moe import MoeSpec, parse_experts

RULES = FamilyRules(window=WindowRule.EVERY_LAYER)
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "eos_token_id": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> MoeSpec:
    """Raises ModelError naming the field."""
    config = with_defaults(config, DEFAULTS)
    refuse_other_activation(config, "silu")
    common = parse_decoder(architecture, RULES, config, generation)
    experts = parse_experts(config, "num_local_experts", "intermediate_size")
    return extended(common, MoeSpec, **experts, renormalize=True, sparse_layers=tuple(range(common.num_layers)))


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, MoeSpec)
    return model_of(build, spec, lambda layer: MixtralBlock(build, spec, layer))


class MixtralBlock(LlamaBlock):
    """Checkpoints have other names for the feed-forward branch and its linear layers."""

    def __init__(self, build: Build, spec: MoeSpec, layer: int) -> None:
        attention = Attention(build, attention_shape(spec, layer))
        names = ExpertNames(gate="w1", up="w3", down="w2")
        super().__init__(spec, attention, SparseMLP(build, spec.expert_shape, renormalize=True, names=names))

    def children(self) -> Iterator[tuple[str, Module]]:
        return (("block_sparse_moe" if name == "mlp" else name, child) for name, child in super().children())
