"""Gemma 3, the text part: Gemma 2's block without its caps on scores, with normed queries and keys, a window in five of
six layers, and another rope in those (Gemma team 2025, arXiv 2503.19786)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sempre.kernels.rope import RopeSpec
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import AttentionShape
from sempre.workers.layers.module import Build
from sempre.workers.layers.norm import OffsetHeadNorm
from sempre.workers.models.base import CausalLM
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
from sempre.workers.models.gemma2 import GemmaSpec, gemma_attention_shape, gemma_model, parse_cap
from sempre.workers.models.multimodal import TEXT_PART, text_part
from sempre.workers.models.rope_config import rope_of_full_layers, rope_of_windowed_layers

RULES = FamilyRules(
    qkv_bias=BiasRule.ATTENTION_BIAS,
    o_bias=BiasRule.ATTENTION_BIAS,
    window=WindowRule.LAYER_TYPES,
    rope=rope_of_full_layers,
    qk_norm=True,
)
DEFAULTS: dict[str, object] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
WINDOWED_THETA = 10000.0
MULTIMODAL = "Gemma3ForConditionalGeneration"


@dataclass(frozen=True)
class Gemma3Spec(GemmaSpec):
    """`rope` is that of the layers without a window."""

    windowed_rope: RopeSpec


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Gemma3Spec:
    """Raises ModelError naming the field."""
    if architecture == MULTIMODAL:
        config = text_part(config, tied_by_default=True)
    refuse_other_activation(config, "gelu_pytorch_tanh", "hidden_activation")
    if config.boolean("use_bidirectional_attention", default=False):
        config.fail("use_bidirectional_attention", "false", True)
    if config.raw.get("attn_logit_softcapping") is not None:
        config.fail("attn_logit_softcapping", "null for this architecture", config.raw["attn_logit_softcapping"])
    full_every = config.positive("sliding_window_pattern", default=6)
    config = with_layer_types(with_defaults(config, DEFAULTS), full_every)
    common = parse_decoder(architecture, RULES, config, generation)
    theta = config.positive_number("rope_local_base_freq", default=WINDOWED_THETA)
    return extended(
        common,
        Gemma3Spec,
        query_scale=config.positive_number("query_pre_attn_scalar", default=256.0) ** -0.5,
        attention_cap=None,
        logit_cap=parse_cap(config, "final_logit_softcapping", None),
        windowed_rope=rope_of_windowed_layers(config, common.head_dim, common.max_position_embeddings, theta),
    )


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Gemma3Spec)

    def shape_of(layer: int) -> AttentionShape:
        shape = replace(gemma_attention_shape(spec, layer), qk_norm=OffsetHeadNorm)
        return shape if spec.windows[layer] is None else replace(shape, rope=spec.windowed_rope)

    model = gemma_model(build, spec, shape_of)
    if spec.architecture == MULTIMODAL:
        model.part = TEXT_PART
    return model
