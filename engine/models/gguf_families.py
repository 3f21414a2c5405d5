"""The architectures of GGUF files: their names of tensors, and what their metadata is in a config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from sempre.engine.models.gguf_file import GgufFile
from sempre.engine.models.gguf_rope import rope_fields
from sempre.ipc.errors import ModelError
from sempre.ipc.gguf_index import Form

_MOST_WIDTH = 2**20
_MOST_HEADS = 4096
_MOST_POSITIONS = 2**27
_MOST_EXPERTS = 4096
_SOFTMAX = 1
# whether an attention has biases, where not all of an architecture do
_BIAS = "blk.0.attn_q.bias"

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FEED_FORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LLAMA = {**_NORMS, **_ATTENTION, **_FEED_FORWARD}
_GEMMA = {**_GEMMA_NORMS, **_ATTENTION, **_FEED_FORWARD}


@dataclass(frozen=True)
class Shape:
    """The sizes that all architectures have."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int


@dataclass(frozen=True)
class Target:
    """What a tensor of transformers is made of."""

    sources: tuple[str, ...]
    form: Form = Form.PLAIN
    number: int = 0


Config = dict[str, object]


@dataclass(frozen=True)
class Family:
    """One architecture."""

    model: str
    """transformers' name of it"""
    layer: Mapping[str, str]
    """the modules of a layer, by transformers' names; each has a weight"""
    biases: tuple[str, ...] = ()
    """those that also have a bias"""
    optional_biases: tuple[str, ...] = ()
    """those that may, all or none of them"""
    turned_heads: bool = False
    """whether rows of queries and keys take turns between the halves of a head"""
    offset_norms: bool = False
    """whether norms are stored with one added"""
    more: Callable[[GgufFile, Shape], Config] = field(default=lambda file, shape: {})
    """fields of config.json beyond those of all"""
    experts: Callable[[int, int], Iterator[tuple[str, Target]]] | None = None
    """tensors of a layer's experts, by the layer and the number of experts"""


def _gated_experts(names: tuple[str, str, str], parent: str) -> Callable[[int, int], Iterator[tuple[str, Target]]]:
    """Experts with tensors of their own in transformers, and one stack for each kind in the file."""

    def tensors(layer: int, count: int) -> Iterator[tuple[str, Target]]:
        for expert in range(count):
            for name, kind in zip(names, ("gate", "up", "down"), strict=True):
                stored = f"blk.{layer}.ffn_{kind}_exps.weight"
                yield f"{parent}.{expert}.{name}.weight", Target((stored,), Form.EXPERT, expert)

    return tensors


def _stacked_experts(layer: int, count: int) -> Iterator[tuple[str, Target]]:
    stored = f"blk.{layer}.ffn_"
    for suffix, ending in (("", ".weight"), ("_bias", ".bias")):
        gate_up = (f"{stored}gate_exps{ending}", f"{stored}up_exps{ending}")
        yield f"mlp.experts.gate_up_proj{suffix}", Target(gate_up, Form.TURNS)
        form = Form.PLAIN if suffix else Form.TRANSPOSED
        yield f"mlp.experts.down_proj{suffix}", Target((f"{stored}down_exps{ending}",), form)


def _llama_more(file: GgufFile, shape: Shape) -> Config:
    return {"attention_bias": _BIAS in file.tensors, "mlp_bias": False, "intermediate_size": _inner(file)}


def _mixtral_more(file: GgufFile, shape: Shape) -> Config:
    return {"sliding_window": None, "intermediate_size": _inner(file), **_expert_counts(file, "num_local_experts")}


def _inner(file: GgufFile) -> int:
    return file.metadata.count(f"{file.architecture}.feed_forward_length", _MOST_WIDTH)


def _dense_more(file: GgufFile, shape: Shape) -> Config:
    return {"intermediate_size": _inner(file)}


def _expert_counts(file: GgufFile, name: str) -> Config:
    metadata, arch = file.metadata, file.architecture
    metadata.expect(f"{arch}.expert_gating_func", _SOFTMAX, default=_SOFTMAX)
    return {
        name: metadata.count(f"{arch}.expert_count", _MOST_EXPERTS),
        "num_experts_per_tok": metadata.count(f"{arch}.expert_used_count", _MOST_EXPERTS),
    }


def _qwen3_moe_more(file: GgufFile, shape: Shape) -> Config:
    metadata, arch = file.metadata, file.architecture
    metadata.expect(f"{arch}.expert_weights_norm", True, default=True)
    return {
        "intermediate_size": _inner(file),
        "moe_intermediate_size": metadata.count(f"{arch}.expert_feed_forward_length", _MOST_WIDTH),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_expert_counts(file, "num_experts"),
    }


def _gpt_oss_more(file: GgufFile, shape: Shape) -> Config:
    metadata, arch = file.metadata, file.architecture
    metadata.get(f"{arch}.feed_forward_length", int)
    return {
        "attention_bias": True,
        "intermediate_size": metadata.count(f"{arch}.expert_feed_forward_length", _MOST_WIDTH),
        "sliding_window": metadata.count(f"{arch}.attention.sliding_window", _MOST_POSITIONS),
        **_expert_counts(file, "num_local_experts"),
    }


def _phi3_more(file: GgufFile, shape: Shape) -> Config:
    window = file.metadata.get(f"{file.architecture}.attention.sliding_window", int)
    return {"intermediate_size": _inner(file), "sliding_window": window or None}


def _gemma_more(file: GgufFile, shape: Shape, largest_layers: int) -> Config:
    """The scale of queries is not in the file: it is that of the heads, but for the largest model of a generation."""
    largest = shape.num_layers == largest_layers
    return {
        "intermediate_size": _inner(file),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.hidden_size // shape.num_heads if largest else shape.head_dim,
        "sliding_window": file.metadata.count(f"{file.architecture}.attention.sliding_window", _MOST_POSITIONS),
    }


def _gemma2_more(file: GgufFile, shape: Shape) -> Config:
    caps = {
        "attn_logit_softcapping": file.metadata.get("gemma2.attn_logit_softcapping", float),
        "final_logit_softcapping": file.metadata.get("gemma2.final_logit_softcapping", float),
    }
    return _gemma_more(file, shape, largest_layers=46) | caps


def _gemma3_more(file: GgufFile, shape: Shape) -> Config:
    file.metadata.expect("gemma3.attention.sliding_window_pattern", 6, default=6)
    cap = file.metadata.get("gemma3.final_logit_softcapping", float)
    local = file.metadata.get("gemma3.rope.freq_base_swa", float)
    return _gemma_more(file, shape, largest_layers=62) | {
        "final_logit_softcapping": cap,
        "rope_local_base_freq": 10000.0 if local is None else shortest_decimal(local),
        "sliding_window_pattern": 6,
    }


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ALL_ATTENTION = tuple(_ATTENTION)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA, optional_biases=_ALL_ATTENTION, turned_heads=True, more=_llama_more),
    "mistral3": Family("MistralForCausalLM", _LLAMA, turned_heads=True, more=_dense_more),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA, biases=_QKV, more=_dense_more),
    "qwen3": Family("Qwen3ForCausalLM", {**_LLAMA, **_HEAD_NORMS}, more=_dense_more),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM",
        {**_NORMS, **_ATTENTION, **_HEAD_NORMS, "mlp.gate": "ffn_gate_inp"},
        more=_qwen3_moe_more,
        experts=_gated_experts(("gate_proj", "up_proj", "down_proj"), "mlp.experts"),
    ),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA, offset_norms=True, more=_gemma2_more),
    "gemma3": Family("Gemma3ForCausalLM", {**_GEMMA, **_HEAD_NORMS}, offset_norms=True, more=_gemma3_more),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "mlp.router": "ffn_gate_inp",
            **_ATTENTION,
        },
        biases=(*_ALL_ATTENTION, "mlp.router"),
        more=_gpt_oss_more,
        experts=_stacked_experts,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            **_NORMS,
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        more=_phi3_more,
    ),
}
"""By the field general.architecture."""

_MIXTRAL = Family(
    "MixtralForCausalLM",
    {**_NORMS, **_ATTENTION, "block_sparse_moe.gate": "ffn_gate_inp"},
    turned_heads=True,
    more=_mixtral_more,
    experts=_gated_experts(("w1", "w3", "w2"), "block_sparse_moe.experts"),
)


def family_of(file: GgufFile) -> Family:
    """Raises ModelError for an unknown architecture."""
    family = FAMILIES.get(file.architecture)
    if family is None:
        raise ModelError(
            f"{file.path}: GGUF field 'general.architecture': expected one of {', '.join(FAMILIES)}, found"
            f" {file.architecture!r}."
        )
    # Mixtral has the name of its dense relative
    return _MIXTRAL if "blk.0.ffn_gate_exps.weight" in file.tensors and family.experts is None else family


def read_shape(file: GgufFile) -> Shape:
    """The sizes of a file. Raises ModelError naming the field."""
    metadata, arch = file.metadata, file.architecture
    hidden_size = metadata.count(f"{arch}.embedding_length", _MOST_WIDTH)
    num_heads = metadata.count(f"{arch}.attention.head_count", _MOST_HEADS)
    head_dim = metadata.count(f"{arch}.attention.key_length", _MOST_WIDTH, default=max(1, hidden_size // num_heads))
    if head_dim % 2:
        metadata.fail(f"{arch}.attention.key_length", "an even number", head_dim)
    metadata.expect(f"{arch}.attention.value_length", head_dim, default=head_dim)
    return Shape(
        # each layer has its own tensors, so there cannot be more layers than tensors
        num_layers=metadata.count(f"{arch}.block_count", max(1, len(file.tensors))),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=metadata.count(f"{arch}.attention.head_count_kv", _MOST_HEADS, default=num_heads),
        head_dim=head_dim,
        context_length=metadata.count(f"{arch}.context_length", _MOST_POSITIONS),
    )


def config_of(file: GgufFile, family: Family, shape: Shape, vocab_size: int) -> Config:
    """The fields of config.json. Raises ModelError naming the field of the file."""
    metadata, arch = file.metadata, file.architecture
    metadata.expect(f"{arch}.vocab_size", vocab_size, default=vocab_size)
    epsilon = metadata.require(f"{arch}.attention.layer_norm_rms_epsilon", float)
    theta = metadata.get(f"{arch}.rope.freq_base", float)
    return {
        "architectures": [family.model],
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shortest_decimal(epsilon),
        # GGUF's default
        "rope_theta": 10000.0 if theta is None else shortest_decimal(theta),
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **family.more(file, shape),
        **rope_fields(file, shape.head_dim, shape.context_length),
    }


def targets(file: GgufFile, family: Family, shape: Shape, num_experts: int) -> dict[str, Target]:
    """Every tensor that the model reads, by transformers' name."""
    norm = Form.OFFSET if family.offset_norms else Form.PLAIN
    found = {
        "model.embed_tokens.weight": Target(("token_embd.weight",)),
        "model.norm.weight": Target(("output_norm.weight",), norm),
    }
    if "output.weight" in file.tensors:
        found["lm_head.weight"] = Target(("output.weight",))
    for layer in range(shape.num_layers):
        found |= {f"model.layers.{layer}.{name}": target for name, target in _layer(file, family, shape, layer)}
        if family.experts is not None:
            found |= {f"model.layers.{layer}.{name}": t for name, t in family.experts(layer, num_experts)}
    return found


def _layer(file: GgufFile, family: Family, shape: Shape, layer: int) -> Iterator[tuple[str, Target]]:
    heads = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads} if family.turned_heads else {}
    for name, stored in family.layer.items():
        form, number = Form.PLAIN, 0
        if stored in heads:
            form, number = Form.HEADS, heads[stored]
        elif stored.endswith("_norm") and family.offset_norms:
            form = Form.OFFSET
        yield f"{name}.weight", Target((f"blk.{layer}.{stored}.weight",), form, number)
        if name in family.biases or (name in family.optional_biases and _BIAS in file.tensors):
            yield f"{name}.bias", Target((f"blk.{layer}.{stored}.bias",), form, number)
    if "blk.0.attn_sinks.weight" in file.tensors:
        yield "self_attn.sinks", Target((f"blk.{layer}.attn_sinks.weight",))


def shortest_decimal(value: float) -> float:
    """Undo the float32 storage of a decimal constant: 9.999999747378752e-06 → 1e-05."""
    return float(str(np.float32(value)))
