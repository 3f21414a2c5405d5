"""config.json → ModelSpec: the spellings that exist, and refusals that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sempre.ipc.errors import ModelError, UnknownArchitecture
from sempre.kernels.rope import cos_sin_table
from sempre.workers.models.config import ModelSpec
from sempre.workers.models.registry import FILES, load_spec, parse_spec

BASE: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}


def spec(**changes: object) -> ModelSpec:
    return parse_spec({**BASE, **changes}, {})


def test_plain_llama() -> None:
    plain = spec()
    assert (plain.head_dim, plain.windows) == (16, (None,) * 4)
    assert not any((plain.qkv_bias, plain.o_bias, plain.mlp_bias, plain.qk_norm, plain.tie_word_embeddings))
    assert plain.rope.theta == 10000.0


def test_missing_key_value_heads_mean_one_per_query_head() -> None:
    assert spec(num_key_value_heads=None).num_kv_heads == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rope_may_be_spelled_in_three_ways(changes: dict[str, object]) -> None:
    rope = spec(**changes).rope
    assert (rope.scaling, rope.theta, rope.factor, rope.original_max_position_embeddings) == ("llama3", 5e5, 8.0, 64)


def test_linear_rope() -> None:
    assert spec(rope_scaling={"type": "linear", "factor": 2.0}).rope.factor == 2.0


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32, "beta_slow": 2}, 256),
        ({"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 4.0, "attention_factor": 0.7}, 256),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "rope_theta": 300.0}, 256),
        (LONGROPE, 64),
        (LONGROPE, 65),
        ({**LONGROPE, "attention_factor": 1.3}, 256),
    ],
)
def test_angles_are_those_of_transformers(rope: dict[str, Any], length: int) -> None:
    config = transformers.LlamaConfig(**BASE, rope_parameters=dict(rope))
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=length)
    angles = torch.arange(length).double()[:, None] * frequencies.double()
    expected = torch.cat([angles.cos(), angles.sin()], dim=1) * factor
    for spelling in ({"rope_parameters": rope}, {"rope_scaling": rope, "rope_theta": rope.get("rope_theta")}):
        found = cos_sin_table(spec(**spelling).rope, length).double()
        assert float((found - expected).abs().max()) < 5e-5


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_fields_that_change_nothing_are_accepted(spelling: str) -> None:
    neutral = {"type": "default", "factor": 1.0, "attention_factor": 1, "mrope_section": None, "rope_type": None}
    assert spec(**{spelling: neutral}) == spec(**{spelling: {}}) == spec()


@pytest.mark.parametrize(("name", "value"), [("torch_dtype", "bfloat16"), ("dtype", "float16")])
def test_dtype_may_be_spelled_in_two_ways(name: str, value: str) -> None:
    assert spec(**{name: value}).checkpoint_dtype == value


def test_families() -> None:
    qwen2 = spec(architectures=["Qwen2ForCausalLM"])
    assert qwen2.qkv_bias
    assert not qwen2.o_bias
    qwen3 = spec(architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm
    assert qwen3.head_dim == 128
    assert spec(architectures=["MistralForCausalLM"], sliding_window=32).windows == (32,) * 4
    assert spec(architectures=["MistralForCausalLM"], sliding_window=None).windows == (None,) * 4
    default = transformers.MistralConfig().sliding_window
    assert spec(architectures=["MistralForCausalLM"]).windows == (default,) * 4


def test_upper_layers_window() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_window_layers": 3}
    assert spec(**qwen).windows == (None,) * 4
    assert spec(**qwen, use_sliding_window=True).windows == (None, None, None, 32)


def test_end_of_sequence_ids_prefer_the_generation_config() -> None:
    config = {**BASE, "eos_token_id": 2}
    assert parse_spec(config, {}).eos_token_ids == (2,)
    assert parse_spec(config, {"eos_token_id": [4, 3]}).eos_token_ids == (4, 3)
    assert parse_spec(config, {"eos_token_id": None}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 65}, "hidden_size"),
        ({"hidden_size": 80, "num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size"),
        ({"intermediate_size": 100}, "intermediate_size"),
        ({"head_dim": 17}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "exl2"}}, "quantization_config: quant_method"),
        ({"torch_dtype": "float64"}, "torch_dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 0.5}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_scaling": {"type": "axial", "factor": 4.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "su", "short_factor": [1.0] * 7}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [0.0] * 8}}, "short_factor: 0"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "high_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"eos_token_id": 320}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
    ],
)
def test_field_that_cannot_be_honoured_is_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: .*{field}: expected .*, found "):
        spec(**changes)


def test_rope_parameters_per_layer_type_are_refused() -> None:
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ModelError, match="rope_parameters"):
        spec(rope_parameters=nested)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnknownArchitecture, match="Did you mean Qwen2ForCausalLM") as caught:
        spec(architectures=["Qwen2VLForCausalLM"])
    assert caught.value.architecture == "Qwen2VLForCausalLM"
    for known in FILES:
        assert known in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_unreadable_config_names_the_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_spec(tmp_path)


def test_missing_folder_and_missing_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: file not found"):
        load_spec(tmp_path)


def test_saved_configs_of_transformers_are_read(checkpoints: Any) -> None:
    folder = checkpoints("llama-llama3-rope").folder
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    assert load_spec(folder).rope.scaling == "llama3"
