"""GGUF → safetensors folder: exact weights, config, tokenizer, and refusals that name what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sempre.engine.models.gguf_convert import convert_gguf
from sempre.engine.models.safetensors_writer import bfloat16_bits, write_bfloat16
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ModelError, TensorMismatch

IDS = torch.tensor([[1, 40, 77, 5, 130, 200, 9, 9, 31, 2]])


def load_converted(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_float32_file_gives_the_original_weights_and_logits(tmp_path: Path, write_gguf, tied: bool) -> None:
    sample = write_gguf(tmp_path / "a.gguf", tied=tied)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in tensors) is not tied
    originals = dict(sample.model.named_parameters())
    assert tensors.keys() == originals.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), originals[name]), name
    with torch.no_grad():
        assert torch.equal(load_converted(tmp_path / "out")(IDS).logits, sample.model(IDS).logits)


def test_rows_left_in_file_order_give_other_logits(tmp_path: Path, write_gguf) -> None:
    """The control of the test above: it does notice the order of Q and K rows."""
    sample = write_gguf(tmp_path / "a.gguf")
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)
    model = load_converted(tmp_path / "out")
    with torch.no_grad():
        query = model.model.layers[0].self_attn.q_proj.weight
        query.copy_(query.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64).clone())
        assert not torch.equal(model(IDS).logits, sample.model(IDS).logits)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
def test_other_types_are_dequantised_and_rounded_once(tmp_path: Path, write_gguf, kind: str) -> None:
    sample = write_gguf(tmp_path / "a.gguf", quantization=GGMLQuantizationType[kind])
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)
    originals = dict(sample.model.named_parameters())
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor.float(), originals[name]), name


def test_config_and_tokenizer(tmp_path: Path, write_gguf) -> None:
    sample = write_gguf(tmp_path / "a.gguf")
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 50000.0
    assert config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 16
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<|im_start|>", "<|im_end|>", (2,))
    for text in ["The quick 2024 fox", "<|im_start|>user\nnaïve<|im_end|>", " 12a  3", "日本語\n\n"]:
        assert tokenizer.encode(text) == sample.tokenizer.encode(text).ids
    digits = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("1234")]
    assert digits == ["1", "2", "3", "4"]


def test_bos_is_added_when_the_file_says_so(tmp_path: Path, write_gguf) -> None:
    def change(writer: GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.ggml.add_bos_token"]
        writer.add_add_bos_token(True)

    sample = write_gguf(tmp_path / "a.gguf", change=change)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    plain = sample.tokenizer.encode("fox").ids
    assert tokenizer.encode("fox") == [1, *plain]
    assert tokenizer.encode("fox", add_special_tokens=False) == plain


def replaced(key: str, add: Callable[[GGUFWriter], None]) -> Callable[[GGUFWriter], None]:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        add(writer)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.add_uint32("llama.expert_count", 8), "llama.expert_count"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type"),
        (lambda w: w.add_bool("tokenizer.ggml.add_eos_token", True), "tokenizer.ggml.add_eos_token"),
        (lambda w: w.kv_data[0].pop("llama.block_count"), "llama.block_count"),
        (replaced("tokenizer.ggml.pre", lambda w: w.add_tokenizer_pre("qwen2")), "tokenizer.ggml.pre"),
        (replaced("tokenizer.ggml.model", lambda w: w.add_tokenizer_model("llama")), "tokenizer.ggml.model"),
        (replaced("llama.context_length", lambda w: w.add_string("llama.context_length", "8k")), "context_length"),
        (replaced("tokenizer.ggml.bos_token_id", lambda w: w.add_bos_token_id(99999)), "bos_token_id"),
        (replaced("tokenizer.ggml.merges", lambda w: w.add_token_merges(["q zz"])), "tokenizer.ggml.merges"),
        (replaced("tokenizer.ggml.token_type", lambda w: w.add_token_types([1, 1])), "tokenizer.ggml.token_type"),
    ],
)
def test_metadata_that_does_not_fit_is_named(
    tmp_path: Path, write_gguf, change: Callable[[GGUFWriter], None], named: str
) -> None:
    write_gguf(tmp_path / "a.gguf", change=change)
    with pytest.raises(ModelError, match=named):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)


def test_other_architecture_is_refused(tmp_path: Path, write_gguf) -> None:
    write_gguf(tmp_path / "a.gguf", architecture="gptneox")
    with pytest.raises(ModelError, match=r"general\.architecture.*'llama'.*'gptneox'"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)


def test_missing_and_unknown_tensors_are_named(tmp_path: Path, write_gguf) -> None:
    write_gguf(tmp_path / "missing.gguf", without="blk.1.attn_k.weight")
    with pytest.raises(TensorMismatch) as missing:
        convert_gguf(tmp_path / "missing.gguf", tmp_path / "out1", progress=False)
    assert missing.value.tensor == "blk.1.attn_k.weight"
    assert missing.value.found == "missing"

    def add_bias(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))

    write_gguf(tmp_path / "unknown.gguf", change=add_bias)
    with pytest.raises(TensorMismatch) as unknown:
        convert_gguf(tmp_path / "unknown.gguf", tmp_path / "out2", progress=False)
    assert unknown.value.tensor == "blk.0.attn_q.bias"


def test_wrong_shape_is_named(tmp_path: Path, write_gguf) -> None:
    wrong = np.zeros((32, 64), np.float32)
    change = replaced("", lambda w: w.add_tensor("blk.0.attn_output.weight", wrong))
    write_gguf(tmp_path / "a.gguf", change=change, without="blk.0.attn_output.weight")
    with pytest.raises(TensorMismatch, match=r"\(64, 64\), found \(32, 64\)"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model" * 9)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out", progress=False)


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**127), max_value=2.0**127), min_size=1))
def test_rounding_is_that_of_torch(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(bfloat16_bits(array), expected)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF])
def test_values_without_a_finite_bfloat16_are_refused(tmp_path: Path, bits: int) -> None:
    """NaN, the NaN whose sum wraps around, both infinities, and the largest float32, which rounds to infinity."""
    value = np.array([bits], np.uint32).view(np.float32)
    with pytest.raises(ModelError, match=r"'w'.*not finite"):
        write_bfloat16(tmp_path / "a.safetensors", {"w": (1,)}, lambda name: [value])
