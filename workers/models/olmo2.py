"""OLMo 2 and 3: branches are normed before they are added and read the stream as it is; queries and keys are normed
over all their heads; OLMo 3 has a window in three of four layers (OLMo team 2024, arXiv 2501.00656)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sempre.kernels.attention import KvCache
from sempre.kernels.rope import RopeSpec
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention, AttentionShape
from sempre.workers.layers.module import Build, Module
from sempre.workers.layers.norm import ProjectionNorm, RMSNorm
from sempre.workers.models.base import Branch, CausalLM
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    WindowRule,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
    with_layer_types,
)
from sempre.workers.models.llama import attention_shape, gated_mlp, model_of
from sempre.workers.models.rope_config import rope_of_full_layers, rope_of_windowed_layers
from sempre.workers.steps import StepInput, rows_read

RULES = FamilyRules(qkv_bias=BiasRule.ATTENTION_BIAS, o_bias=BiasRule.ATTENTION_BIAS, qk_norm=True)
OLMO3_RULES = replace(RULES, window=WindowRule.LAYER_TYPES, rope=rope_of_full_layers)
DEFAULTS: dict[str, object] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
}
OLMO3_THETA = 500000.0
OLMO3_DEFAULTS = {**DEFAULTS, "rope_theta": OLMO3_THETA, "sliding_window": 4096}
OLMO3_FULL_EVERY = 4


@dataclass(frozen=True)
class Olmo3Spec(ModelSpec):
    """`rope` is that of the layers without a window."""

    windowed_rope: RopeSpec


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> ModelSpec:
    """Raises ModelError naming the field."""
    refuse_other_activation(config, "silu")
    if architecture == "Olmo2ForCausalLM":
        return parse_decoder(architecture, RULES, with_defaults(config, DEFAULTS), generation)
    config = with_layer_types(with_defaults(config, OLMO3_DEFAULTS), OLMO3_FULL_EVERY)
    # transformers turns the layers with a window by the default whatever this says
    if config.positive_number("rope_theta") != OLMO3_THETA:
        config.fail(
            "rope_theta", f"{OLMO3_THETA} (else rope_parameters, for each type of layer)", config.raw["rope_theta"]
        )
    common = parse_decoder(architecture, OLMO3_RULES, config, generation)
    rope = rope_of_windowed_layers(config, common.head_dim, common.max_position_embeddings, OLMO3_THETA)
    return extended(common, Olmo3Spec, windowed_rope=rope)


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    return model_of(build, spec, lambda layer: OlmoBlock(build, spec, layer))


def _attention_shape(spec: ModelSpec, layer: int) -> AttentionShape:
    shape = replace(attention_shape(spec, layer), qk_norm=ProjectionNorm)
    if isinstance(spec, Olmo3Spec) and spec.windows[layer] is not None:
        return replace(shape, rope=spec.windowed_rope)
    return shape


class OlmoBlock(Module):
    """No norm in front of a branch, one behind it."""

    def __init__(self, build: Build, spec: ModelSpec, layer: int) -> None:
        self.self_attn = Attention(build, _attention_shape(spec, layer))
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, role="branch norm")
        self.mlp = gated_mlp(build, spec)
        self.post_feedforward_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, role="branch norm")

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: KvCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if branch is not None:
            assert isinstance(branch, torch.Tensor), "a block of this kind before"
            residual.add_(branch)
        attended = self.self_attn(residual, step, cache)
        residual = rows_read(residual, step)
        residual.add_(self.post_attention_layernorm(attended))
        return self.post_feedforward_layernorm(self.mlp(residual)), residual
