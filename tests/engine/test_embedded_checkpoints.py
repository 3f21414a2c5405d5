"""The shipped checkpoints: their size, format and tokenizer, and that the models know English."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sempre.engine.checkpoints import EMBEDDED, embedded_checkpoint

# Jane Austen, Mansfield Park, chapter XLVIII, from the part of the novel that was held out of training
HELD_OUT = (
    "Let other pens dwell on guilt and misery. I quit such odious subjects as soon as I can, impatient to restore "
    "everybody, not greatly in fault themselves, to tolerable comfort, and to have done with all the rest.\n\n"
    "My Fanny, indeed, at this very time, I have the satisfaction of knowing, must have been happy in spite of "
    "everything. She must have been a happy creature in spite of all that she felt, or thought she felt, for the "
    "distress of those around her. She had sources of delight that must force their way."
)
BITS_PER_BYTE_BOUND = {"tiny": 1.6, "tiny-draft": 1.8}
PARAMETER_BOUNDS = {"tiny": (9e6, 11e6), "tiny-draft": (0.8e6, 1.2e6)}


def folder(name: str) -> Path:
    path = embedded_checkpoint(name)
    assert path is not None
    return path


def test_unknown_names_are_not_embedded() -> None:
    assert embedded_checkpoint("tiny2") is None
    assert embedded_checkpoint("") is None
    assert embedded_checkpoint("../tiny") is None


def test_both_together_stay_below_25_megabytes() -> None:
    total = sum(file.stat().st_size for name in EMBEDDED for file in folder(name).iterdir())
    assert 0 < total < 25_000_000


@pytest.mark.parametrize("name", EMBEDDED)
def test_folder_holds_config_weights_tokenizer_and_card(name: str) -> None:
    assert {file.name for file in folder(name).iterdir()} == {
        "MODEL_CARD.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_tokenizers_are_the_same_bytes() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder("tiny") / file).read_bytes() == (folder("tiny-draft") / file).read_bytes()


@pytest.mark.parametrize("name", EMBEDDED)
def test_tensors_are_bfloat16_with_hugging_face_names_and_shapes(name: str) -> None:
    config = json.loads((folder(name) / "config.json").read_text())
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    expected = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        expected |= {
            f"model.layers.{layer}.{suffix}.weight": shape
            for suffix, shape in {
                "input_layernorm": [hidden],
                "post_attention_layernorm": [hidden],
                "self_attn.q_proj": [queries, hidden],
                "self_attn.k_proj": [keys, hidden],
                "self_attn.v_proj": [keys, hidden],
                "self_attn.o_proj": [hidden, queries],
                "mlp.gate_proj": [inner, hidden],
                "mlp.up_proj": [inner, hidden],
                "mlp.down_proj": [hidden, inner],
            }.items()
        }
    with safe_open(folder(name) / "model.safetensors", framework="pt") as file:
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {key: part.get_shape() for key, part in found.items()} == expected
        assert {part.get_dtype() for part in found.values()} == {"BF16"}
    low, high = PARAMETER_BOUNDS[name]
    assert low < sum(math.prod(shape) for shape in expected.values()) < high


@pytest.mark.parametrize("name", EMBEDDED)
def test_config_is_the_classic_flat_form(name: str) -> None:
    config = json.loads((folder(name) / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 4096,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config["hidden_size"] % 64 == 0
    assert config["intermediate_size"] % 64 == 0


def test_tokenizer_has_4096_tokens_and_the_special_ones_first() -> None:
    tokenizer = Tokenizer.from_file(str(folder("tiny") / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.token_to_id(token) for token in special] == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        HELD_OUT,
        "  two blanks,\ttabs\r\nand lines\n\n\n",
        "Ça alors : déjà vu, naïve œuvre — “quotes”",
        "Привет, 你好, नमस्ते, שלום, 🦜👩‍👩‍👧‍👦",
        "\x00\x7f\ufeff\u2028",
        "".join(map(chr, range(0x20, 0x250))),
    ],
)
def test_tokenizer_round_trips_utf8(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder("tiny") / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template_renders_chatml() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder("tiny"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text, add_special_tokens=False).count(1) == 3


@pytest.mark.parametrize("name", EMBEDDED)
def test_bits_per_byte_of_a_held_out_passage(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder(name) / "tokenizer.json"))
    ids = torch.tensor([[0, *tokenizer.encode(HELD_OUT).ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
    bits_per_byte = nats / math.log(2) / len(HELD_OUT.encode())
    assert bits_per_byte < BITS_PER_BYTE_BOUND[name], f"{name}: {bits_per_byte:.4f}"
