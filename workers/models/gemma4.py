"""Gemma 4, the text part (Google DeepMind 2026).

Gemma 3's sandwich of norms. Layers that see all keys have heads of their own, whose keys may be their values; the last
layers read the keys and values of earlier ones; a small embedding of the token for each layer is added at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch

from sempre.kernels.activation import Activation, gelu_mul
from sempre.kernels.attention import HeadLayout, KvCache, ScoreParams
from sempre.kernels.norms import rms_norm
from sempre.kernels.rope import RopeSpec
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.models.base import CausalLM, rows_read
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
    with_layer_types,
)
from sempre.workers.models.gemma2 import CappedLM, GemmaSpec, ScaledStack, parse_cap
from sempre.workers.models.llama import attention_shape
from sempre.workers.models.multimodal import TEXT_PART, text_part
from sempre.workers.models.rope_config import rope_of_full_layers, rope_of_windowed_layers
from sempre.workers.steps import StepInput, of_rows_read
from sempre.workers.tensor_source import Parameter

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

    @property
    def kv_layers(self) -> tuple[LayerKv, ...]:
        common = LayerKv(self.num_kv_heads, self.head_dim)
        return tuple(
            (self.full_heads if window is None else common)._replace(source=source)
            for window, source in zip(self.windows, self.sources, strict=True)
        )

    def one_layer_per_kind(self) -> Self:
        own = (source is None for source in self.sources)
        kinds = list(dict.fromkeys(zip(self.windows, own, strict=True)))
        return replace(
            self,
            num_layers=len(kinds),
            windows=tuple(window for window, _ in kinds),
            sources=tuple(None if is_own else kinds.index((window, True)) for window, is_own in kinds),
        )


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> Gemma4Spec:
    """Raises ModelError naming the field."""
    if architecture in MULTIMODAL:
        config = text_part(config, tied_by_default=True)
    _refuse_unsupported(config)
    is_unified = architecture in UNIFIED
    config = _with_ropes(_with_layer_types(config.with_defaults(UNIFIED_DEFAULTS if is_unified else DEFAULTS)))
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
    )


def _refuse_unsupported(config: ConfigFields) -> None:
    refuse_other_activation(config, "gelu_pytorch_tanh", "hidden_activation")
    if config.raw.get("use_bidirectional_attention") not in (None, False, "vision"):
        config.fail("use_bidirectional_attention", "null or 'vision'", config.raw["use_bidirectional_attention"])
    if config.boolean("enable_moe_block", default=False):
        config.fail("enable_moe_block", "false (layers with a mixture of experts are not supported)", True)


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
    if config.raw.get("per_layer_config") is None:
        kv_heads = common_kv_heads
        if keys_are_values:
            kv_heads = config.positive("num_global_key_value_heads", default=common_kv_heads, most=MAX_HEADS)
        return LayerKv(kv_heads, width("global_head_dim", config, default=512, most=MAX_HEAD_DIM))
    types = config.raw["layer_types"]
    assert isinstance(types, list)
    # numbers may have leading zeros
    of_layer = {str(layer).lstrip("0") or "0": sizes for layer, sizes in stated.raw.items()}
    full = [str(layer) for layer, kind in enumerate(types) if kind == FULL]
    first = of_layer.get(full[0])
    if of_layer != dict.fromkeys(full, first) or not isinstance(first, dict):
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


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, Gemma4Spec)
    blocks = [Gemma4Block(build, spec, layer) for layer in range(spec.num_layers)]
    stack = Gemma4Stack(build, spec, blocks)
    model = CappedLM(build, spec, stack) if spec.logit_cap is not None else CausalLM(build, spec, stack)
    if spec.architecture in MULTIMODAL:
        model.part = TEXT_PART
    readers = [layer for layer, source in enumerate(spec.sources) if source is not None]
    # published files have them, though nothing reads them
    parts = ("k_proj", "v_proj", "k_norm", "v_norm")
    model.unread = tuple(f"model.layers.{layer}.self_attn.{part}." for layer in readers for part in parts)
    return model


def _attention(build: Build, spec: Gemma4Spec, layer: int) -> Attention:
    window, kv = spec.windows[layer], spec.kv_layers[layer]
    parts: Literal[0, 1, 2] = 1 if spec.keys_are_values and window is None else 2
    shape = replace(
        attention_shape(spec, layer),
        heads=HeadLayout(spec.num_heads, kv.num_kv_heads, kv.head_dim, parts if kv.source is None else 0),
        scores=ScoreParams(spec.query_scale, window),
        rope=spec.rope if window is None else spec.windowed_rope,
        v_norm=True,
    )
    return Attention(build, shape)


def _norm(spec: ModelSpec, role: str = "normed") -> RMSNorm:
    return RMSNorm(spec.hidden_size, spec.rms_norm_eps, role=role)


class Gemma4Block(Module):
    """Adds its own branches, since all that it returns is multiplied at the end."""

    scalar: torch.Tensor
    """[1]"""

    def __init__(self, build: Build, spec: Gemma4Spec, layer: int) -> None:
        self.reads_other = spec.sources[layer] is not None
        doubled = 2 if self.reads_other and spec.doubled_readers else 1
        self.input_layernorm = _norm(spec)
        self.self_attn = _attention(build, spec, layer)
        self.post_attention_layernorm = _norm(spec, "branch norm")
        self.pre_feedforward_layernorm = _norm(spec)
        self.mlp = GatedMLP(build, spec.hidden_size, spec.intermediate_size * doubled, activation=Activation.GELU)
        self.post_feedforward_layernorm = _norm(spec, "branch norm")
        self._layer = layer
        self._sizes = spec.per_layer
        if spec.per_layer is not None:
            gate = {"per_layer_input_gate": spec.per_layer.width}
            self.per_layer_input_gate = Linear(build, gate, spec.hidden_size, role="per layer gate")
            projection = {"per_layer_projection": spec.hidden_size}
            self.per_layer_projection = Linear(build, projection, spec.per_layer.width)
            self.post_per_layer_input_norm = _norm(spec, "branch norm")

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".layer_scalar", Parameter((1,), initial="ones")

    def load(self, path: str, tensors: Tensors) -> None:
        self.scalar = tensors.vector(path + ".layer_scalar")

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield self.scalar

    def allocate(self, scratch: Scratch) -> None:
        if self._sizes is not None:
            self._mixed = scratch.rows("per layer mixed", self._sizes.width)

    def __call__(
        self,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        step: StepInput,
        cache: KvCache,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`inputs` [S, width of a layer's embedding times layers]: what each layer gets of the rows that are read."""
        attended = self.self_attn(self.input_layernorm.of_sum(branch, residual), step, cache)
        residual = rows_read(residual, step)
        branch = self.post_attention_layernorm(attended)
        branch = self.mlp(self.pre_feedforward_layernorm.of_sum(branch, residual))
        residual.add_(self.post_feedforward_layernorm(branch))
        if inputs is not None and self._sizes is not None:
            start = self._layer * self._sizes.width
            own = inputs[:, start : start + self._sizes.width]
            mixed = gelu_mul(self.per_layer_input_gate(residual), own, self._mixed.first(own.shape[0]))
            residual.add_(self.post_per_layer_input_norm(self.per_layer_projection(mixed)))
        return None, residual.mul_(self.scalar)


class PerLayerNorm(RMSNorm):
    """Of the part of each layer, in place."""

    def allocate(self, scratch: Scratch) -> None:
        """Nothing: it has no rows of its own."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, L * width], contiguous"""
        parts = x.view(-1, self.width)
        rms_norm(parts, self.weight, self.eps, parts)
        return x


class Gemma4Stack(ScaledStack):
    """Once the last keys and values are cached, only the rows that are read go on."""

    def __init__(self, build: Build, spec: Gemma4Spec, blocks: Sequence[Gemma4Block]) -> None:
        super().__init__(Embedding(spec.vocab_size, spec.hidden_size), blocks, _norm(spec))
        self._sizes = spec.per_layer
        if spec.per_layer is not None:
            vocab, size, count = spec.per_layer
            self.embed_tokens_per_layer = Embedding(vocab, size * count, role="per layer ids")
            projection = {"per_layer_model_projection": size * count}
            self.per_layer_model_projection = Linear(build, projection, spec.hidden_size, role="per layer")
            self.per_layer_projection_norm = PerLayerNorm(size, spec.rms_norm_eps)

    def allocate(self, scratch: Scratch) -> None:
        super().allocate(scratch)
        if self._sizes is not None:
            scale = torch.tensor(self._sizes.width**0.5, dtype=scratch.activations, device="cpu")
            self._per_layer_scale = scale.item()

    def __call__(self, step: StepInput, caches: Sequence[Any]) -> torch.Tensor:
        residual, branch = self.embed(step.token_ids), None
        inputs = self._per_layer_inputs(residual, step.token_ids)
        blocks = [block for block in self.layers if isinstance(block, Gemma4Block)]
        last_writer = max(index for index, block in enumerate(blocks) if not block.reads_other)
        all_rows, rows_after = replace(step, outputs=None), of_rows_read(step)
        for index, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            if index == last_writer and inputs is not None:
                inputs = rows_read(inputs, step)
            of_block = all_rows if index < last_writer else step if index == last_writer else rows_after
            branch, residual = block(branch, residual, of_block, cache, inputs)
        return self.norm.of_sum(branch, residual)

    def _per_layer_inputs(self, embedded: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor | None:
        """[T, L * width]: what each layer gets of the tokens, by their embeddings in common and for it."""
        if self._sizes is None:
            return None
        projected = self.per_layer_model_projection(embedded).mul_(self.embed_tokens.width**-0.5)
        own = self.embed_tokens_per_layer(token_ids).mul_(self._per_layer_scale)
        return self.per_layer_projection_norm(projected).add_(own).mul_(2**-0.5)
