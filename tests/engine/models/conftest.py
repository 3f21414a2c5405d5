"""A small llama checkpoint, as transformers has it and as a GGUF file of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The quick brown fox jumps over the lazy dog 1234 times. It's a naïve café, don't you think? 3.14 "


@dataclass(frozen=True)
class SampleModel:
    """The original: its transformers model, its tokenizer, and the GGUF name of each of its tensors."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    gguf_names: dict[str, str]


def make_tokenizer() -> Tokenizer:
    """Train a byte-level BPE whose pre-tokenizer takes digits one by one."""
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


def make_model(vocab_size: int, *, tied: bool) -> LlamaForCausalLM:
    """Return a random llama model whose weights are exact in bfloat16."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1)
            parameter.copy_(values.bfloat16().float())
    return model


def gguf_names(num_layers: int) -> dict[str, str]:
    """Return the GGUF name of each tensor by its transformers name."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(num_layers):
        names |= {f"model.layers.{layer}.{hf}.weight": f"blk.{layer}.{gguf}.weight" for hf, gguf in parts.items()}
    return names


def interleave_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of Q or K as GGUF's llama architecture has them."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_metadata(writer: GGUFWriter, sample: SampleModel) -> None:
    config = sample.model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sample.tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(sample.tokenizer.to_str())["model"]["merges"]
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


WriteGguf = Callable[..., SampleModel]


@pytest.fixture
def write_gguf() -> WriteGguf:
    """Write the sample as GGUF and return the original.

    `quantization` is the type of the matrices; with Q4_1 the returned model holds the quantised values.
    `change(writer)` adds to the file, `without` leaves a tensor out.
    """

    def write(
        path: Path,
        *,
        tied: bool = True,
        quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
        change: Callable[[GGUFWriter], None] | None = None,
        without: str = "",
        architecture: str = "llama",
    ) -> SampleModel:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer.get_vocab_size(), tied=tied)
        names = gguf_names(model.config.num_hidden_layers)
        if not tied:
            names["lm_head.weight"] = "output.weight"
        sample = SampleModel(model, tokenizer, names)
        writer = GGUFWriter(path, architecture)
        write_metadata(writer, sample)
        if change is not None:
            change(writer)
        parameters = dict(model.named_parameters())
        for name, gguf_name in names.items():
            values = parameters[name].detach().numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
                stored = interleave_halves(values, heads)
            else:
                stored = values
            dtype = quantization if values.ndim == 2 else GGMLQuantizationType.F32
            if gguf_name != without:
                writer.add_tensor(gguf_name, quantize(stored, dtype), raw_dtype=dtype)
            if dtype != GGMLQuantizationType.F32:
                # Rows are quantised one by one, so quantising the unordered matrix gives the same values.
                exact = torch.from_numpy(np.array(dequantize(quantize(values, dtype), dtype)))
                parameters[name].data.copy_(exact.bfloat16().float())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sample

    return write
