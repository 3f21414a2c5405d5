"""A small llama checkpoint, as transformers has it and as a GGUF file of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from gguf_files import add_tokenizer, finish, make_tokenizer, turned
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class SampleModel:
    """The original: its transformers model, its tokenizer, and the GGUF name of each of its tensors."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    gguf_names: dict[str, str]


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
    add_tokenizer(writer, sample.tokenizer)


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
                stored = turned(values, heads)
            else:
                stored = values
            dtype = quantization if values.ndim == 2 else GGMLQuantizationType.F32
            if gguf_name != without:
                writer.add_tensor(gguf_name, quantize(stored, dtype), raw_dtype=dtype)
            if dtype != GGMLQuantizationType.F32:
                # Rows are quantised one by one, so quantising the unordered matrix gives the same values.
                exact = torch.from_numpy(np.array(dequantize(quantize(values, dtype), dtype)))
                parameters[name].data.copy_(exact.bfloat16().float())
        finish(writer)
        return sample

    return write
