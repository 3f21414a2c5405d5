"""gpt-oss: a mixture of experts in every layer, a window in every other one, and a sink for each head of queries.

OpenAI 2025 (arXiv 2508.10925). Checkpoints hold the experts in MXFP4, or as transformers writes them in floats.
"""

from __future__ import annotations

import re
from dataclasses import replace

from sempre.kernels.activation import Activation
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.module import Build
from sempre.workers.layers.moe import Router, SparseMLP, stacked_experts
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
from sempre.workers.models.llama import LlamaBlock, attention_shape, model_of
from sempre.workers.models.moe import MoeSpec, parse_experts
from sempre.workers.quantization.config import Mxfp4Spec, StoredQuantization
from sempre.workers.quantization.mxfp4 import BLOCK

DEFAULTS: dict[str, object] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "attention_bias": True,
    "num_experts_per_tok": 4,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# of the activation (`kernels.activation`)
FIXED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
PACKED = ("experts.gate_up_proj", "experts.down_proj")


def _quantization(config: ConfigFields) -> StoredQuantization | None:
    if config.raw.get("quantization_config") is None:
        return None
    fields = config.section("quantization_config")
    for name, value in fields.raw.items():
        if name == "quant_method" and value != "mxfp4":
            fields.fail(name, "'mxfp4' for this architecture", value)
        if name not in ("quant_method", "modules_to_not_convert", "dequantize"):
            fields.fail(name, "of mxfp4 only the fields quant_method, modules_to_not_convert and dequantize", value)
    kept = fields.raw.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(entry, str) for entry in kept):
        fields.fail("modules_to_not_convert", "a list of module names", kept)
    for layer in range(config.positive("num_hidden_layers")):
        experts = f"model.layers.{layer}.mlp.experts"
        if any(_covers(entry, experts) for entry in kept):
            fields.fail("modules_to_not_convert", f"what leaves {experts} in MXFP4", kept)
    for name in ("hidden_size", "intermediate_size"):
        if config.positive(name) % BLOCK:
            config.fail(name, f"a multiple of {BLOCK} for experts in MXFP4", config.raw[name])
    return Mxfp4Spec(PACKED)


def _covers(entry: str, module: str) -> bool:
    """As transformers takes an entry: a pattern from the name's start to the end of one of its parts, or its end."""
    try:
        return module.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return True


RULES = FamilyRules(
    qkv_bias=BiasRule.ATTENTION_BIAS,
    o_bias=BiasRule.ATTENTION_BIAS,
    window=WindowRule.LAYER_TYPES,
    quantization=_quantization,
)


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> MoeSpec:
    """Raises ModelError naming the field."""
    # transformers takes either name
    count = "num_local_experts" if config.raw.get("num_experts") is None else "num_experts"
    config = with_defaults(config, {**DEFAULTS, count: 128})
    if config.raw.get("rope_parameters") is None and config.raw.get("rope_scaling") is None:
        config = ConfigFields({**config.raw, "rope_parameters": ROPE}, config.source)
    config = with_layer_types(config, 2)
    refuse_other_activation(config, "silu")
    for name, value in FIXED.items():
        if config.positive_number(name, default=value) != value:
            config.fail(name, repr(value), config.raw[name])
    experts = parse_experts(config, count, "intermediate_size")
    # older files have it twice
    if config.positive("experts_per_token", default=experts["experts_per_token"]) != experts["experts_per_token"]:
        config.fail("experts_per_token", "what num_experts_per_tok says", config.raw["experts_per_token"])
    common = parse_decoder(architecture, RULES, config, generation)
    return extended(common, MoeSpec, **experts, renormalize=True, sparse_layers=tuple(range(common.num_layers)))


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, MoeSpec)
    return model_of(build, spec, lambda layer: _block(build, spec, layer))


def _block(build: Build, spec: MoeSpec, layer: int) -> LlamaBlock:
    attention = Attention(build, replace(attention_shape(spec, layer), has_sinks=True))
    router = Router(build, "router", spec.num_experts, spec.hidden_size, bias=True)
    experts = stacked_experts(build, spec.expert_shape, Activation.CLAMPED)
    # a softmax of the chosen logits alone is that of all, divided by the sum of the chosen
    return LlamaBlock(spec, attention, SparseMLP(build, spec.expert_shape, renormalize=True, parts=(router, experts)))
