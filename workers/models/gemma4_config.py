"""What config.json says of a Gemma 4."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from sempre.kernels.moe import ExpertShape
from sempre.kernels.rope import RopeSpec
from sempre.workers.config_fields import ConfigFields
from sempre.workers.models.config import (
    FULL,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_VOCAB_SIZE,
    WINDOWED,
    BiasRule,
    FamilyRules,
    LayerKv,
    ModelSpec,
    WindowRule,
    extended,
    parse_decoder,
    refuse_other_activation,
    width,
    with_defaults,
    with_layer_types,
)
from sempre.workers.models.gemma2 import GemmaSpec, parse_cap
from sempre.workers.models.moe import MAX_EXPERTS
from sempre.workers.models.multimodal import text_part
from sempre.workers.models.rope_config import rope_of_full_layers, rope_of_windowed_layers

MULTIMODAL = ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration")
# without embeddings for each layer, and with longer sequences
UNIFIED = ("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration")
RULES = FamilyRules(
    qkv_bias=BiasRule.ATTENTION_BIAS, o_bias=BiasRule.ATTENTION_BIAS, window=WindowRule.LAYER_TYPES, qk_norm=True
)
DEFAULTS: dict[str, object] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "hidden_size_per_layer_input": 256,
}
UNIFIED_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
ROPES = {
    WINDOWED: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
FULL_EVERY = 6


class PerLayerSizes(NamedTuple):
    """Of the embeddings for each layer."""

    vocab_size: int
    width: int
    num_layers: int


@dataclass(frozen=True)
class Gemma4Spec(GemmaSpec):
    """`rope` is that of the layers without a window, whose heads are `full_heads`; the others have the common ones."""

    windowed_rope: RopeSpec
    full_heads: LayerKv
    keys_are_values: bool
    """in the layers without a window, before norm and rope"""
    sources: tuple[int | None, ...]
    """per layer: the one whose keys and values it reads; None: its own"""
    doubled_readers: bool
    """whether layers that read another's have a feed-forward branch twice as wide"""
    per_layer: PerLayerSizes | None
    experts: ExpertShape | None

    @property
    def kv_layers(self) -> tuple[LayerKv, ...]:
        common = LayerKv(self.num_kv_heads, self.head_dim)
        return tuple(
            (self.full_heads if window is None else common)._replace(source=source)
            for window, source in zip(self.windows, self.sources, strict=True)
        )

    def kind_of(self, layer: int) -> Hashable:
        return super().kind_of(layer), self.sources[layer] is None

    def with_layers(self, layers: Sequence[int]) -> Self:
        own = {self.windows[layer]: index for index, layer in enumerate(layers) if self.sources[layer] is None}
        sources = tuple(None if self.sources[layer] is None else own[self.windows[layer]] for layer in layers)
        return replace(super().with_layers(layers), sources=sources)


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Gemma4Spec:
    """Raises ModelError naming the field."""
    if architecture in MULTIMODAL:
        config = text_part(config, tied_by_default=True)
    _refuse_unsupported(config)
    is_unified = architecture in UNIFIED
    config = _with_ropes(_with_layer_types(with_defaults(config, UNIFIED_DEFAULTS if is_unified else DEFAULTS)))
    keys_are_values = config.boolean("attention_k_eq_v", default=False)
    full = _full_heads(config, keys_are_values=keys_are_values)
    rules = replace(RULES, rope=lambda fields, _, most: rope_of_full_layers(fields, full.head_dim, most))
    common = parse_decoder(architecture, rules, config, generation)
    if common.num_heads % full.num_kv_heads:
        config.fail("num_global_key_value_heads", f"a divisor of {common.num_heads} heads", full.num_kv_heads)
    return extended(
        common,
        Gemma4Spec,
        query_scale=1.0,
        attention_cap=None,
        logit_cap=parse_cap(config, "final_logit_softcapping", None),
        windowed_rope=rope_of_windowed_layers(config, common.head_dim, common.max_position_embeddings, 10000.0),
        full_heads=full,
        keys_are_values=keys_are_values,
        sources=_sources(config, common.windows),
        doubled_readers=config.boolean("use_double_wide_mlp", default=False),
        per_layer=_per_layer_sizes(config, common, is_unified=is_unified),
        experts=_expert_shape(config, common, is_unified=is_unified),
    )


def _refuse_unsupported(config: ConfigFields) -> None:
    refuse_other_activation(config, "gelu_pytorch_tanh", "hidden_activation")
    if config.raw.get("use_bidirectional_attention") not in (None, False, "vision"):
        config.fail("use_bidirectional_attention", "null or 'vision'", config.raw["use_bidirectional_attention"])


def _with_layer_types(config: ConfigFields) -> ConfigFields:
    """The last layer sees all keys whatever the config says."""
    config = with_layer_types(config, FULL_EVERY)
    types = config.raw["layer_types"]
    if not isinstance(types, list):
        config.fail("layer_types", "a list", types)
    return ConfigFields({**config.raw, "layer_types": [*types[:-1], FULL]}, config.source)


def _with_ropes(config: ConfigFields) -> ConfigFields:
    if config.raw.get("rope_parameters") is None:
        return ConfigFields({**config.raw, "rope_parameters": ROPES}, config.source)
    ropes, types = config.section("rope_parameters"), config.raw["layer_types"]
    assert isinstance(types, list)
    for kind in (FULL, WINDOWED):
        if kind in types and ropes.raw.get(kind) is None:
            ropes.fail(kind, "the rope of these layers", None)
    return config


def _full_heads(config: ConfigFields, *, keys_are_values: bool) -> LayerKv:
    """In either spelling: sizes of all such layers, or those of each by itself."""
    common_kv_heads = config.positive("num_key_value_heads", most=MAX_HEADS)
    stated = config.section("per_layer_config")
    if "per_layer_config" not in config.raw:
        kv_heads = common_kv_heads
        if keys_are_values:
            kv_heads = config.positive("num_global_key_value_heads", default=common_kv_heads, most=MAX_HEADS)
        return LayerKv(kv_heads, width("global_head_dim", config, default=512, most=MAX_HEAD_DIM))
    types = config.raw["layer_types"]
    assert isinstance(types, list)
    # numbers may have leading zeros
    of_layer = {str(layer).lstrip("0") or "0": sizes for layer, sizes in stated.raw.items()}
    full = [str(layer) for layer, kind in enumerate(types) if kind == FULL]
    # nothing is written of layers whose sizes are the common ones
    first = of_layer.get(full[0]) if of_layer else {}
    if (of_layer and of_layer != dict.fromkeys(full, first)) or not isinstance(first, dict):
        config.fail("per_layer_config", f"the same sizes for each of the layers {', '.join(full)}", stated.raw)
    sizes = ConfigFields(first, stated.source)
    for name, value in first.items():
        if name not in ("head_dim", "num_key_value_heads"):
            sizes.fail(name, "only head_dim and num_key_value_heads", value)
    kv_heads = sizes.positive("num_key_value_heads", default=common_kv_heads, most=MAX_HEADS)
    return LayerKv(kv_heads, width("head_dim", sizes, default=width("head_dim", config), most=MAX_HEAD_DIM))


def _sources(config: ConfigFields, windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """The last layers read the last earlier one of their kind."""
    shared = config.natural("num_kv_shared_layers", default=0)
    if shared >= len(windows):
        config.fail("num_kv_shared_layers", f"less than num_hidden_layers={len(windows)}", shared)
    first = len(windows) - shared
    own = windows[:first]
    if shared and set(windows) != set(own):
        config.fail("num_kv_shared_layers", "a layer of each kind before those that share", shared)
    last = {window: layer for layer, window in enumerate(own)}
    return (None,) * first + tuple(last[window] for window in windows[first:])


def _per_layer_sizes(config: ConfigFields, common: ModelSpec, *, is_unified: bool) -> PerLayerSizes | None:
    if not config.raw.get("hidden_size_per_layer_input"):
        return None
    size = width("hidden_size_per_layer_input", config)
    if is_unified:
        config.fail("hidden_size_per_layer_input", "0 for this architecture", size)
    vocab = config.positive("vocab_size_per_layer_input", default=262144, most=MAX_VOCAB_SIZE)
    if vocab < common.vocab_size:
        config.fail("vocab_size_per_layer_input", f"at least vocab_size={common.vocab_size}", vocab)
    return PerLayerSizes(vocab, size, common.num_layers)


def _expert_shape(config: ConfigFields, common: ModelSpec, *, is_unified: bool) -> ExpertShape | None:
    if not config.boolean("enable_moe_block", default=False):
        return None
    if is_unified:
        config.fail("enable_moe_block", "false for this architecture", True)
    count, chosen = config.positive("num_experts", most=MAX_EXPERTS), config.positive("top_k_experts")
    if chosen > count:
        config.fail("top_k_experts", f"at most num_experts={count}", chosen)
    return ExpertShape(count, chosen, common.hidden_size, width("moe_intermediate_size", config))
