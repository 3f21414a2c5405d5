"""SmolLM3: Llama's block, where the heads of some layers do not turn (Hugging Face, SmolLM3, 2025)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from sempre.kernels.rope import RopeSpec
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.module import Build
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import (
    FULL,
    MAX_LAYERS,
    WINDOWED,
    BiasRule,
    FamilyRules,
    ModelSpec,
    WindowRule,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import LlamaBlock, attention_shape, gated_mlp, model_of

RULES = FamilyRules(
    qkv_bias=BiasRule.ATTENTION_BIAS,
    o_bias=BiasRule.ATTENTION_BIAS,
    mlp_bias=BiasRule.MLP_BIAS,
    window=WindowRule.LAYER_TYPES,
)
DEFAULTS: dict[str, object] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 128001,
}


@dataclass(frozen=True)
class SmolLM3Spec(ModelSpec):
    """Windows are those of layers without rope."""

    rope_layers: tuple[bool, ...]
    """per layer: whether the heads turn"""

    def kind_of(self, layer: int) -> Hashable:
        return super().kind_of(layer), self.rope_layers[layer]

    def with_layers(self, layers: Sequence[int]) -> Self:
        return replace(super().with_layers(layers), rope_layers=tuple(self.rope_layers[layer] for layer in layers))


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> SmolLM3Spec:
    """Raises ModelError naming the field."""
    refuse_other_activation(config, "silu")
    config = with_defaults(config, DEFAULTS, nullable=("num_key_value_heads",))
    rope_layers = _rope_layers(config, config.positive("num_hidden_layers", most=MAX_LAYERS))
    windowed = config.boolean("use_sliding_window", default=False) and config.raw.get("sliding_window") is not None
    types = config.raw.get("layer_types")
    if types is None:
        types = [WINDOWED if windowed and not turns else FULL for turns in rope_layers]
    elif not windowed and isinstance(types, list) and WINDOWED in types:
        config.fail("layer_types", f"{FULL!r} everywhere without use_sliding_window and sliding_window", types)
    typed = ConfigFields({**config.raw, "layer_types": types}, config.source)
    return extended(parse_decoder(architecture, RULES, typed, generation), SmolLM3Spec, rope_layers=rope_layers)


def _rope_layers(config: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    flags = config.raw.get("no_rope_layers")
    if flags is None:
        interval = config.positive("no_rope_layer_interval", default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    # the field's name says the opposite of its values
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        config.fail("no_rope_layers", f"a list of at least {num_layers} times 1 (with rope) or 0 (without)", flags)
    return tuple(bool(flag) for flag in flags[:num_layers])


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, SmolLM3Spec)
    still = RopeSpec(spec.head_dim, scaling="none")

    def block(layer: int) -> LlamaBlock:
        shape = attention_shape(spec, layer)
        if not spec.rope_layers[layer]:
            shape = replace(shape, rope=still)
        return LlamaBlock(spec, Attention(build, shape), gated_mlp(build, spec))

    return model_of(build, spec, block)
