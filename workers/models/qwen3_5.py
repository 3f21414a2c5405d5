"""Qwen3.5 and 3.6, the text part, and Qwen3-Next: gated delta layers, every fourth one gated attention; dense, or with
experts.

Gated delta rule: Yang et al. 2024 (arXiv 2412.06464). Layers that predict more tokens at once are in checkpoints, and
are not read.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from sempre.kernels.gated_delta import DeltaHeads
from sempre.kernels.states import StateShape
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import GatedAttention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.gated_delta import DeltaShape, GatedDelta
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build, Module
from sempre.workers.layers.moe import SparseMLP
from sempre.workers.layers.norm import OffsetHeadNorm, OffsetRMSNorm
from sempre.workers.models.base import Branch, CausalLM, Stack
from sempre.workers.models.config import (
    FULL,
    MAX_HEAD_DIM,
    MAX_HEADS,
    WIDTH_MULTIPLE,
    BiasRule,
    FamilyRules,
    ModelSpec,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import attention_shape, gated_mlp
from sempre.workers.models.multimodal import TEXT_PART, text_part
from sempre.workers.models.qwen2_moe import Qwen2MoeSpec, Qwen2SparseMLP, parse_with_shared
from sempre.workers.models.rope_config import PARTIAL, rope_of_part
from sempre.workers.steps import StepInput, rows_read

RULES = FamilyRules(
    qkv_bias=BiasRule.ATTENTION_BIAS,
    o_bias=BiasRule.ATTENTION_BIAS,
    rope=rope_of_part,
    qk_norm=True,
)
DENSE_DEFAULTS: dict[str, object] = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
}
MOE_DEFAULTS: dict[str, object] = {
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
NEXT_DEFAULTS: dict[str, object] = {
    **MOE_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}
NEXT = "Qwen3NextForCausalLM"
# by what they have: experts in every layer or in none, and images or not
DENSE = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
MULTIMODAL = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
LINEAR = "linear_attention"
# kernels keep the inputs before a row in registers
CONV_WIDTHS = range(2, 5)
# these say which of three positions turns a dimension; those of text are equal
MROPE = ("mrope_section", "mrope_interleaved")
UNREAD = ("mtp.",)
# fields with one value that is computed, in published configs though transformers does not read them
FIXED: dict[str, object] = {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}
# likewise of those where every layer has experts; Qwen3-Next may have others
EVERYWHERE: dict[str, object] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True)
class Qwen35Spec(ModelSpec):
    delta: DeltaHeads
    linear_layers: tuple[int, ...]
    """layers with gated delta; the others have attention"""

    @property
    def layer_states(self) -> tuple[StateShape | None, ...]:
        return tuple(self.delta.states if layer in self.linear_layers else None for layer in range(self.num_layers))

    def kind_of(self, layer: int) -> Hashable:
        return super().kind_of(layer), layer in self.linear_layers

    def with_layers(self, layers: Sequence[int]) -> Self:
        linear = tuple(index for index, layer in enumerate(layers) if layer in self.linear_layers)
        return replace(super().with_layers(layers), linear_layers=linear)


@dataclass(frozen=True)
class Qwen35MoeSpec(Qwen35Spec, Qwen2MoeSpec):
    """With experts in some layers."""


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Qwen35Spec:
    """Raises ModelError naming the field."""
    if architecture in MULTIMODAL:
        config = text_part(config, tied_by_default=False)
    defaults = NEXT_DEFAULTS if architecture == NEXT else MOE_DEFAULTS
    config = with_defaults(config, DENSE_DEFAULTS if architecture in DENSE else defaults)
    _refuse_other_values(config, FIXED)
    if architecture not in (*DENSE, NEXT):
        _refuse_other_values(config, EVERYWHERE)
        # no layer is without experts, and so of this size
        config = with_defaults(config, {"intermediate_size": config.raw["moe_intermediate_size"]})
    refuse_other_activation(config, "silu")
    common = parse_decoder(architecture, RULES, _plain_rope(config), generation)
    hybrid: dict[str, Any] = {"delta": _delta_heads(config), "linear_layers": _linear_layers(config, common.num_layers)}
    if architecture in DENSE:
        return extended(common, Qwen35Spec, **hybrid)
    return extended(
        common,
        Qwen35MoeSpec,
        **hybrid,
        **parse_with_shared(config, common.num_layers),
        renormalize=config.boolean("norm_topk_prob", default=True),
    )


def _refuse_other_values(config: ConfigFields, fixed: Mapping[str, object]) -> None:
    for name, only in fixed.items():
        if config.raw.get(name) not in (None, only):
            config.fail(name, f"{json.dumps(only)} for this architecture", config.raw[name])


def _plain_rope(config: ConfigFields) -> ConfigFields:
    """As text sees it; without the kinds of layers, which are read by `_linear_layers`."""
    raw: dict[str, object] = {**config.raw, "layer_types": None}
    if raw.get(PARTIAL) is None:
        raw[PARTIAL] = 0.25
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.section(name).raw
        if rope:
            raw[name] = {key: value for key, value in rope.items() if key not in MROPE}
    return ConfigFields(raw, config.source)


def _linear_layers(config: ConfigFields, num_layers: int) -> tuple[int, ...]:
    types = config.raw.get("layer_types")
    if types is None:
        every = config.positive("full_attention_interval", default=4)
        if every > num_layers:
            config.fail("full_attention_interval", f"at most num_hidden_layers={num_layers}", every)
        return tuple(layer for layer in range(num_layers) if (layer + 1) % every)
    is_known = isinstance(types, list) and len(types) == num_layers and all(kind in (FULL, LINEAR) for kind in types)
    # blocks of the KV cache are what sequences are counted by
    if not is_known or not isinstance(types, list) or FULL not in types:
        config.fail("layer_types", f"a list of {num_layers} times {FULL!r}, at least once, or {LINEAR!r}", types)
    return tuple(layer for layer, kind in enumerate(types) if kind == LINEAR)


def _delta_heads(config: ConfigFields) -> DeltaHeads:
    num_keys = config.positive("linear_num_key_heads", default=16, most=MAX_HEADS)
    num_values = config.positive("linear_num_value_heads", default=32, most=MAX_HEADS)
    if num_values % num_keys:
        config.fail("linear_num_value_heads", f"a multiple of linear_num_key_heads={num_keys}", num_values)
    dims = {
        name: config.positive(f"linear_{name}_head_dim", default=128, most=MAX_HEAD_DIM) for name in ("key", "value")
    }
    for name, dim in dims.items():
        if dim % WIDTH_MULTIPLE:
            config.fail(
                f"linear_{name}_head_dim", f"a multiple of {WIDTH_MULTIPLE} (the width of the kernels' vectors)", dim
            )
    conv_width = config.positive("linear_conv_kernel_dim", default=4)
    if conv_width not in CONV_WIDTHS:
        config.fail("linear_conv_kernel_dim", f"from {CONV_WIDTHS[0]} to {CONV_WIDTHS[-1]}", conv_width)
    return DeltaHeads(num_keys, num_values, dims["key"], dims["value"], conv_width)


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Qwen35Spec)
    blocks = [Qwen35Block(build, spec, layer) for layer in range(spec.num_layers)]
    norm = OffsetRMSNorm(spec.hidden_size, spec.rms_norm_eps)
    model = CausalLM(build, spec, Stack(Embedding(build, spec.vocab_size, spec.hidden_size), blocks, norm))
    model.unread = UNREAD
    model.part = TEXT_PART if spec.architecture in MULTIMODAL else None
    model.may_stack_experts = isinstance(spec, Qwen35MoeSpec)
    return model


class Qwen35Block(Module):
    """Norm and attention or gated delta, norm and feed-forward, each added to the residual stream."""

    def __init__(self, build: Build, spec: Qwen35Spec, layer: int) -> None:
        self.input_layernorm = OffsetRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self._is_linear = layer in spec.linear_layers
        if self._is_linear:
            shape = DeltaShape(spec.hidden_size, spec.delta, spec.rms_norm_eps, grouped=spec.architecture == NEXT)
            self.linear_attn = GatedDelta(build, shape)
        else:
            self.self_attn = GatedAttention(build, replace(attention_shape(spec, layer), qk_norm=OffsetHeadNorm))
        self.post_attention_layernorm = OffsetRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = _mlp(build, spec, layer)

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixer = self.linear_attn if self._is_linear else self.self_attn
        mixed = mixer(self.input_layernorm.of_sum(branch, residual), step, cache)
        residual = rows_read(residual, step)
        return self.mlp(self.post_attention_layernorm.of_sum(mixed, residual)), residual


def _mlp(build: Build, spec: Qwen35Spec, layer: int) -> GatedMLP | SparseMLP:
    if isinstance(spec, Qwen35MoeSpec) and layer in spec.sparse_layers:
        return Qwen2SparseMLP(build, spec)
    return gated_mlp(build, spec)
