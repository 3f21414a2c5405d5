"""GGUF files of checkpoints that transformers saved, with the names that the package `gguf` gives their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from sempre.workers.gguf_source import open_gguf

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The quick brown fox jumps over the lazy dog 1234 times. It's a naïve café, don't you think? 3.14 "
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GptOssForCausalLM": "gpt-oss",
    "Phi3ForCausalLM": "phi3",
}
# where a block has its float16 scales
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
          "IQ4_XS": (0,)}  # fmt: skip

Arrays = Mapping[str, np.ndarray]


def make_tokenizer() -> Tokenizer:
    """Train a byte-level BPE of 320 tokens whose pre-tokenizer takes digits one by one."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def add_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(int(head_dim * part))
    add_rope(writer, rope.get("full_attention", rope))
    for name, add in {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "num_experts": writer.add_expert_count,
        "num_local_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
    }.items():
        # llama has no windows
        if config.get(name) is not None and not (name == "sliding_window" and writer.arch == "llama"):
            add(config[name])
    if writer.arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])


def add_rope(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and kind != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def turned(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of queries or keys as GGUF's llama architecture has them."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """How much longer each wave of Llama 3 is than of its theta alone."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def stored_tensors(tensors: Arrays, config: Mapping[str, Any], arch: str) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF's names and values of transformers' tensors."""
    names = gguf.get_tensor_name_map(_numbers()[arch], config["num_hidden_layers"])
    experts: dict[str, list[np.ndarray]] = {}
    for name, values in tensors.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if ".experts.gate_up_proj" in name:
            layer, ending = name.split(".")[2], "bias" if name.endswith("_bias") else "weight"
            halves = values[..., ::2], values[..., 1::2]
            if arch != "gpt-oss":
                halves = np.split(values, 2, axis=1)  # all gates, then all others
            for part, half in zip(("gate", "up"), halves, strict=True):
                turned_half = half.swapaxes(1, 2) if half.ndim == 3 and arch == "gpt-oss" else half
                yield f"blk.{layer}.ffn_{part}_exps.{ending}", turned_half
        elif ".experts.down_proj" in name:
            layer, ending = name.split(".")[2], "bias" if name.endswith("_bias") else "weight"
            yield (
                f"blk.{layer}.ffn_down_exps.{ending}",
                values.swapaxes(1, 2) if (values.ndim == 3 and arch == "gpt-oss") else values,
            )
        elif ".experts." in name:
            parts = name.split(".")
            parts.pop(parts.index("experts") + 1)
            experts.setdefault(".".join(parts), []).append(values)
        else:
            suffixed = name if name.endswith((".weight", ".bias")) else name + ".weight"
            found = names.get_name(suffixed, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            yield found, _as_stored(found, values, config, arch)
    for name, each in experts.items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        yield found, np.stack(each)


def _as_stored(name: str, values: np.ndarray, config: Mapping[str, Any], arch: str) -> np.ndarray:
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        return turned(values, config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"])
    if arch.startswith("gemma") and name.endswith("_norm.weight"):
        return values + 1
    return values


def _numbers() -> dict[str, Any]:
    return {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def random_blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> np.ndarray:
    """Blocks of any codes, with small scales: the package quantises to some types only."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(seed)
    blocks = drawn.integers(0, 256, (*shape[:-1], shape[-1] // elements, num_bytes), dtype=np.uint8)
    for at in HALVES[kind.name]:
        halves = (drawn.normal(size=blocks.shape[:-1]) * 1e-3).astype(np.float16)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf_of(
    folder: Path,
    target: Path,
    kind_of: Callable[[str], Kind] = lambda name: Kind.F32,
    change: Callable[[GGUFWriter], None] | None = None,
) -> None:
    """Write the checkpoint in `folder` as `target`; `kind_of` says how each matrix is stored."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    writer = GGUFWriter(target, arch)
    add_sizes(writer, config)
    add_tokenizer(writer, make_tokenizer())
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    if rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    if change is not None:
        change(writer)
    for number, (name, values) in enumerate(stored_tensors(tensors, config, arch)):
        kind = kind_of(name) if values.ndim > 1 and "bias" not in name else Kind.F32
        values = np.ascontiguousarray(values)
        raw = random_blocks(values.shape, kind, number) if kind.name in HALVES else quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def widened(source: Path, target: Path) -> None:
    """The same file with all tensors dequantised to float32 by the package."""
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
    finish(writer)


def transformers_llama(folder: Path) -> LlamaForCausalLM:
    """transformers' model of a folder that describes a GGUF file, in float32."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**json.loads((folder / "config.json").read_text())))
    with open_gguf(folder) as source:
        values = {name: source.read(name).float() for name in source.names()}
    if model.config.tie_word_embeddings:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    model.load_state_dict(values, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()
