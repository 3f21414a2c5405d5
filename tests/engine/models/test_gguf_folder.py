"""GGUF → a folder that describes it: weights, config, tokenizer, and refusals that name what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from sempre.engine.models.gguf_folder import write_gguf_folder
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.workers.gguf_source import open_gguf
from sempre.workers.models.registry import load_spec


def describe(path: Path, folder: Path) -> Path:
    write_gguf_folder(path, folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0", "F16", "BF16"])
def test_weights_are_the_original_ones(tmp_path: Path, write_gguf, kind: str, tied: bool) -> None:
    sample = write_gguf(tmp_path / "a.gguf", tied=tied, quantization=GGMLQuantizationType[kind])
    originals = dict(sample.model.named_parameters())
    with open_gguf(describe(tmp_path / "a.gguf", tmp_path / "out")) as source:
        assert set(source.names()) == originals.keys()
        for name in source.names():
            assert torch.equal(source.read(name).bfloat16().float(), originals[name]), name


def test_rows_left_in_file_order_are_others(tmp_path: Path, write_gguf) -> None:
    """The control of the test above: it does notice the order of Q and K rows."""
    sample = write_gguf(tmp_path / "a.gguf")
    query = sample.model.model.layers[0].self_attn.q_proj.weight
    with open_gguf(describe(tmp_path / "a.gguf", tmp_path / "out")) as source:
        found = source.read("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(found, query)
    assert not torch.equal(found.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64), query)


def test_a_file_without_an_end_has_none(tmp_path: Path, write_gguf) -> None:
    """Not that of transformers' class, which may be any token of this vocabulary."""

    def forget(writer: GGUFWriter) -> None:
        for fields in writer.kv_data:
            fields.pop("tokenizer.ggml.eos_token_id", None)
            fields.pop("tokenizer.ggml.eot_token_id", None)

    write_gguf(tmp_path / "a.gguf", change=forget)
    describe(tmp_path / "a.gguf", tmp_path / "out")
    assert load_spec(tmp_path / "out").eos_token_ids == ()


def test_config_and_tokenizer(tmp_path: Path, write_gguf) -> None:
    sample = write_gguf(tmp_path / "a.gguf")
    describe(tmp_path / "a.gguf", tmp_path / "out")
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
    describe(tmp_path / "a.gguf", tmp_path / "out")
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
        (lambda w: w.add_string("llama.rope.scaling.type", "su"), "scaling.factor': expected float, found None"),
        (lambda w: w.add_bool("tokenizer.ggml.remove_extra_whitespaces", True), "remove_extra_whitespaces"),
        (lambda w: w.kv_data[0].pop("llama.block_count"), "llama.block_count"),
        (replaced("tokenizer.ggml.pre", lambda w: w.add_tokenizer_pre("jais")), "tokenizer.ggml.pre"),
        (replaced("tokenizer.ggml.model", lambda w: w.add_tokenizer_model("rwkv")), "tokenizer.ggml.model"),
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
        describe(tmp_path / "a.gguf", tmp_path / "out")


def test_other_architecture_is_refused(tmp_path: Path, write_gguf) -> None:
    write_gguf(tmp_path / "a.gguf", architecture="gptneox")
    with pytest.raises(ModelError, match=r"general\.architecture.*one of llama, .*found 'gptneox'"):
        describe(tmp_path / "a.gguf", tmp_path / "out")


def test_missing_and_unknown_tensors_are_named(tmp_path: Path, write_gguf) -> None:
    write_gguf(tmp_path / "missing.gguf", without="blk.1.attn_k.weight")
    with pytest.raises(TensorMismatch) as missing:
        describe(tmp_path / "missing.gguf", tmp_path / "out1")
    assert missing.value.tensor == "blk.1.attn_k.weight"
    assert missing.value.found == "nothing"

    def add(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q_norm.weight", np.zeros(16, np.float32))

    write_gguf(tmp_path / "unknown.gguf", change=add)
    with pytest.raises(TensorMismatch) as unknown:
        describe(tmp_path / "unknown.gguf", tmp_path / "out2")
    assert unknown.value.tensor == "blk.0.attn_q_norm.weight"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model" * 9)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        describe(tmp_path / "a.gguf", tmp_path / "out")


def test_biases_are_all_there_or_none(tmp_path: Path, write_gguf) -> None:
    write_gguf(tmp_path / "a.gguf", change=lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)))
    with pytest.raises(TensorMismatch, match=r"blk\.0\.attn_k\.bias': expected a tensor of llama, found nothing"):
        describe(tmp_path / "a.gguf", tmp_path / "out")
