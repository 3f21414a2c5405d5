"""What every family must do: greedy tokens of transformers, bits among others, defaults and refusals of its config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError, ModelError, TensorMismatch
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.rope import RopeSpec
from sempre.workers.kv_cache import PagedKvCache, block_bytes
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.loading import live_digest, load_model
from sempre.workers.models.config import LayerKv
from sempre.workers.models.registry import load_spec, parse_spec

GREEDY = SamplingSpec(max_tokens=64, temperature=0.0, logprobs=-1, prompt_logprobs=-1)

FAMILIES = [
    "qwen3.5", "qwen3.5-odd", "qwen3.5-moe", "qwen3.5-moe-odd", "qwen3.5-multimodal", "qwen3.5-moe-multimodal",
    "qwen3-next", "qwen3-next-odd",
    "qwen3-moe-odd", "qwen3-moe-step", "qwen2-moe", "qwen2-moe-odd", "mixtral", "mixtral-odd",
    "glm", "glm4", "glm4-odd", "glm4-moe", "glm4-moe-odd",
    "llama-yarn-rope", "smollm3", "smollm3-odd", "granite", "granite-odd", "olmo2", "olmo2-odd", "olmo3", "olmo3-odd",
    "phi3", "phi3-long",
    "phi3-part", "gemma3", "gemma3-odd",
    "gpt-oss", "gpt-oss-odd",
    "gemma3-multimodal", "gemma4", "gemma4-odd", "gemma4-multimodal", "gemma4-unified", "gemma4-unified-multimodal",
    "llama-proportional-rope", "gemma4-moe", "mistral3-multimodal",
]  # fmt: skip
WINDOWED, FULL = "sliding_attention", "full_attention"


def prompt_ids(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def logprob_bits(finished: Any) -> bytes:
    """Of prompt and output, however they were spread over steps."""
    assert finished.errors == []
    return b"".join(part.logprobs for part in [*finished.prompt_logprobs, *finished.logprobs])


def alone_and_among_others(serving: Any, prompt: Any) -> tuple[Any, Any]:
    wanted = prompt("wanted", prompt_ids(41), GREEDY)
    others = [prompt(f"{i}", prompt_ids(1 + 9 * i, salt=i + 1), GREEDY, chunks=(1 + 3 * i,)) for i in range(5)]
    cut = prompt("wanted", wanted.token_ids, GREEDY, chunks=(7, 1, 16))
    return serving.run(wanted)["wanted"], serving.run(*others[:2], cut, *others[2:])["wanted"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_and_bits_their_own(
    family: str, checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any
) -> None:
    checkpoint = checkpoints(family)
    alone, among_others = alone_and_among_others(serve(checkpoint.folder), prompt)
    assert (among_others.token_ids, logprob_bits(among_others)) == (alone.token_ids, logprob_bits(alone))
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([prompt_ids(41) + alone.token_ids])).logits[0]
    assert alone.token_ids == logits[40:-1].argmax(-1).tolist()
    expected = logits[:-1].double().log_softmax(-1)
    found = torch.cat([dense(alone.prompt_logprobs, 320), dense(alone.logprobs, 320)]).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    # decode is what prefill is
    params = msgspec.structs.replace(GREEDY, max_tokens=1)
    whole = serve(checkpoint.folder).run(prompt("whole", prompt_ids(41) + alone.token_ids, params))["whole"]
    assert logprob_bits(whole)[: len(logprob_bits(alone))] == logprob_bits(alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_control(family: str, checkpoints: Any, serve: Any, prompt: Any) -> None:
    """Ordinary matmuls give a row other bits among others: the test above can fail."""
    alone, among_others = alone_and_among_others(serve(checkpoints(family).folder, numerics="control"), prompt)
    assert logprob_bits(among_others) != logprob_bits(alone)


def test_longrope_is_chosen_by_the_longest_sequence(
    checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any
) -> None:
    checkpoint = checkpoints("phi3-long")
    short, long = serve(checkpoint.folder, max_model_len=32), serve(checkpoint.folder)
    assert short.loaded.fingerprint["config"] != long.loaded.fingerprint["config"]
    ids = prompt_ids(31)
    params = msgspec.structs.replace(GREEDY, max_tokens=1)
    with torch.no_grad():
        expected = torch.log_softmax(checkpoint.model(torch.tensor([ids])).logits[0].double(), dim=-1)[:-1]
    found = {name: dense(run.run(prompt("a", ids, params))["a"].prompt_logprobs, 320).double()
             for name, run in (("short", short), ("long", long))}  # fmt: skip
    assert float((found["short"] - expected).norm() / expected.norm()) < 1e-5
    assert float((found["long"] - expected).norm() / expected.norm()) > 1e-3


def test_dynamic_rope_reaches_as_far_as_the_longest_sequence(
    checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any
) -> None:
    """In the original context it turns as without; beyond, as transformers does in a sequence of that length."""
    checkpoint, length = checkpoints("llama-dynamic-rope"), 150
    short, long = serve(checkpoint.folder), serve(checkpoint.folder, max_model_len=length)
    assert (short.loaded.max_model_len, long.loaded.max_model_len) == (64, length)
    assert short.loaded.fingerprint["config"] != long.loaded.fingerprint["config"]
    params = msgspec.structs.replace(GREEDY, max_tokens=1)
    for run, ids, wrong in ((short, prompt_ids(60), long), (long, [*prompt_ids(length - 1), 5], short)):
        with torch.no_grad():
            expected = torch.log_softmax(checkpoint.model(torch.tensor([ids])).logits[0].double(), dim=-1)[:58]
        found, other = (
            dense(worker.run(prompt("a", ids[:59], params))["a"].prompt_logprobs, 320).double()
            for worker in (run, wrong)
        )
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        assert float((other - expected).norm() / expected.norm()) > 1e-3
    with pytest.raises(ConfigError, match=r"max_model_len: expected 1 to 256 \(max_position_embeddings of the model"):
        serve(checkpoint.folder, max_model_len=257)


ROPES: list[tuple[str, dict[str, object], RopeSpec]] = [
    ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
     RopeSpec(128, 1e4, "dynamic", 2.0, original_max_position_embeddings=512)),
    ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 4, "rope_theta": 5e5, "alpha": None}},
     RopeSpec(128, 5e5, "dynamic", 4.0, original_max_position_embeddings=512)),
    ("Glm4ForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.25},
     RopeSpec(128, 1e4, "dynamic", 2.0, original_max_position_embeddings=512, rotary_dim=32, interleaved=True)),
    ("Glm4ForCausalLM", {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
     RopeSpec(128, 1e4, "proportional", turning_pairs=16, interleaved=True)),
    ("MistralForCausalLM", {"rope_scaling": {"rope_type": "proportional", "factor": 3.0}},
     RopeSpec(128, 1e4, "proportional", 3.0, turning_pairs=64)),
    ("MistralForCausalLM", {"rope_scaling": {"rope_type": "default", "factor": 1.0}}, RopeSpec(128, 1e4)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"), ROPES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_dynamic_and_proportional_ropes_in_both_spellings(
    architecture: str, fields: dict[str, object], expected: RopeSpec
) -> None:
    config = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 512, "vocab_size": 100,
              "eos_token_id": 1}  # fmt: skip
    spec = parse_spec({"architectures": [architecture], **config, **fields}, {})
    assert spec.rope == expected
    assert spec.most_positions == 512 * (expected.factor if expected.scaling == "dynamic" else 1)


DEFAULTS = {
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "Qwen2MoeForCausalLM": transformers.Qwen2MoeConfig,
    "Qwen3_5ForCausalLM": transformers.Qwen3_5TextConfig,
    "Qwen3_5MoeForCausalLM": transformers.Qwen3_5MoeTextConfig,
    "Qwen3NextForCausalLM": transformers.Qwen3NextConfig,
    "GlmForCausalLM": transformers.GlmConfig,
    "Glm4ForCausalLM": transformers.Glm4Config,
    "Glm4MoeForCausalLM": transformers.Glm4MoeConfig,
    "MixtralForCausalLM": transformers.MixtralConfig,
    "SmolLM3ForCausalLM": transformers.SmolLM3Config,
    "GraniteForCausalLM": transformers.GraniteConfig,
    "Olmo2ForCausalLM": transformers.Olmo2Config,
    "Olmo3ForCausalLM": transformers.Olmo3Config,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
    "GptOssForCausalLM": transformers.GptOssConfig,
    "Gemma4ForCausalLM": transformers.Gemma4TextConfig,
    "Gemma4UnifiedForCausalLM": transformers.Gemma4UnifiedTextConfig,
}


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    full = json.loads(DEFAULTS[architecture]().to_json_string(use_diff=False))
    names: dict[str, object] = {"architectures": [architecture]}
    if architecture == "Glm4MoeForCausalLM":
        names["head_dim"] = 128  # without one, heads of its defaults are 42 wide
    assert parse_spec(names, {}) == parse_spec({**full, **names}, {})


def test_older_spellings_of_two_ropes() -> None:
    base = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 7}
    gemma: Any = parse_spec(
        {**base, "architectures": ["Gemma3ForCausalLM"], "rope_theta": 5e5, "rope_local_base_freq": 2e4,
         "sliding_window_pattern": 3}, {}
    )  # fmt: skip
    assert gemma.rope == RopeSpec(256, 5e5, "linear", 8.0)
    assert gemma.windowed_rope == RopeSpec(256, 2e4)
    assert [window is None for window in gemma.windows] == [False, False, True] * 2 + [False]
    olmo: Any = parse_spec({**base, "architectures": ["Olmo3ForCausalLM"]}, {})
    assert (olmo.rope.scaling, olmo.windowed_rope.scaling) == ("linear", "default")


REFUSED: list[tuple[str, str, object, str]] = [
    ("GlmForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("Glm4ForCausalLM", "partial_rotary_factor", 1.5, "partial_rotary_factor: expected an even number of the 128"),
    ("Glm4ForCausalLM", "partial_rotary_factor", 0.01, "partial_rotary_factor: expected an even number of the 128"),
    ("Glm4ForCausalLM", "rope_parameters", {"partial_rotary_factor": 0.01}, "rope_parameters: partial_rotary_factor"),
    ("Glm4ForCausalLM", "attention_bias", 1, "attention_bias: expected true or false"),
    ("Glm4MoeForCausalLM", "n_group", 3, "n_group: expected equal groups of at least two of n_routed_experts=128"),
    ("Glm4MoeForCausalLM", "n_group", 128, "n_group: expected equal groups of at least two"),
    ("Glm4MoeForCausalLM", "topk_group", 2, "topk_group: expected at most n_group=1, found 2"),
    ("Glm4MoeForCausalLM", "num_experts_per_tok", 129, "num_experts_per_tok: expected at most n_routed_experts=128"),
    ("Glm4MoeForCausalLM", "n_shared_experts", 0, "n_shared_experts: expected an integer of at least 1"),
    (
        "Glm4MoeForCausalLM",
        "routed_scaling_factor",
        0,
        "routed_scaling_factor: expected a finite number",
    ),
    ("Glm4MoeForCausalLM", "use_qk_norm", "yes", "use_qk_norm: expected true or false"),
    ("Glm4MoeForCausalLM", "first_k_dense_replace", -1, "first_k_dense_replace: expected an integer of at least 0"),
    (
        "Qwen2MoeForCausalLM",
        "num_experts_per_tok",
        61,
        "num_experts_per_tok: expected at most num_experts=60",
    ),
    ("Qwen2MoeForCausalLM", "shared_expert_intermediate_size", 8, "shared_expert_intermediate_size: expected a multi"),
    ("Qwen2MoeForCausalLM", "qkv_bias", "yes", "qkv_bias: expected true or false"),
    ("Qwen2MoeForCausalLM", "norm_topk_prob", 1, "norm_topk_prob: expected true or false"),
    ("Qwen2MoeForCausalLM", "decoder_sparse_step", 0, "decoder_sparse_step: expected an integer of at least 1"),
    ("Qwen2MoeForCausalLM", "mlp_only_layers", ["0"], "mlp_only_layers: expected a list of layers"),
    ("Qwen2MoeForCausalLM", "use_sliding_window", True, "use_sliding_window: expected false for this architecture"),
    (
        "MixtralForCausalLM",
        "num_local_experts",
        1,
        "num_experts_per_tok: expected at most num_local_experts=1",
    ),
    ("MixtralForCausalLM", "num_local_experts", 10**6, "num_local_experts: expected an integer of at most 4096"),
    ("MixtralForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("MixtralForCausalLM", "intermediate_size", 24, "intermediate_size: expected a multiple of 16"),
    ("MixtralForCausalLM", "layer_types", ["linear_attention"], "layer_types: expected what the sliding-window"),
    ("MixtralForCausalLM", "partial_rotary_factor", 0.5, "partial_rotary_factor: expected 1.0"),
    ("SmolLM3ForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("SmolLM3ForCausalLM", "no_rope_layers", [1] * 35, "no_rope_layers: expected a list of at least 36 times"),
    ("SmolLM3ForCausalLM", "no_rope_layers", [2] * 36, "no_rope_layers: expected a list of at least 36 times"),
    ("SmolLM3ForCausalLM", "no_rope_layer_interval", 0, "no_rope_layer_interval: expected an integer of at least 1"),
    ("SmolLM3ForCausalLM", "layer_types", [WINDOWED] * 36, "layer_types: expected 'full_attention' everywhere"),
    ("GraniteForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("GraniteForCausalLM", "embedding_multiplier", 0, "embedding_multiplier: expected a finite number greater than 0"),
    (
        "GraniteForCausalLM",
        "attention_multiplier",
        "1",
        "attention_multiplier: expected a finite number greater than 0",
    ),
    ("GraniteForCausalLM", "residual_multiplier", -1, "residual_multiplier: expected a finite number greater than 0"),
    ("GraniteForCausalLM", "logits_scaling", True, "logits_scaling: expected a finite number greater than 0"),
    ("Olmo2ForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("Olmo2ForCausalLM", "layer_types", [WINDOWED] * 32, "layer_types: expected what the sliding-window fields imply"),
    ("Olmo3ForCausalLM", "layer_types", [WINDOWED], "layer_types: expected a list of 32 times"),
    ("Olmo3ForCausalLM", "layer_types", ["chunked_attention"] * 32, "layer_types: expected a list of 32 times"),
    ("Olmo3ForCausalLM", "sliding_window", None, "sliding_window: expected a number of keys"),
    ("Olmo3ForCausalLM", "rope_theta", 10000.0, "rope_theta: expected 500000.0"),
    (
        "Olmo3ForCausalLM",
        "rope_parameters",
        {"rope_type": "default"},
        "rope_parameters: rope_type: expected only the objects",
    ),
    ("Phi3ForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("Phi3ForCausalLM", "partial_rotary_factor", 1.5, "partial_rotary_factor: expected an even number of the 128 dim"),
    ("Gemma3ForCausalLM", "hidden_activation", "silu", "hidden_activation: expected 'gelu_pytorch_tanh'"),
    ("Gemma3ForCausalLM", "attn_logit_softcapping", 50.0, "attn_logit_softcapping: expected null"),
    ("Gemma3ForCausalLM", "use_bidirectional_attention", True, "use_bidirectional_attention: expected false"),
    ("Gemma3ForCausalLM", "query_pre_attn_scalar", 0, "query_pre_attn_scalar: expected a finite number greater than 0"),
    (
        "Gemma3ForCausalLM",
        "final_logit_softcapping",
        -1,
        "final_logit_softcapping: expected a finite number greater than 0",
    ),
    ("Gemma3ForCausalLM", "rope_local_base_freq", 0, "rope_local_base_freq: expected a finite number greater than 0"),
    ("Gemma3ForCausalLM", "sliding_window_pattern", 0, "sliding_window_pattern: expected an integer of at least 1"),
    ("GptOssForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("GptOssForCausalLM", "swiglu_alpha", 1.0, "swiglu_alpha: expected 1.702, found 1.0"),
    ("GptOssForCausalLM", "swiglu_limit", 10.0, "swiglu_limit: expected 7.0, found 10.0"),
    ("GptOssForCausalLM", "swiglu_limit", "7", "swiglu_limit: expected a finite number"),
    ("GptOssForCausalLM", "experts_per_token", 2, "experts_per_token: expected what num_experts_per_tok says, found 2"),
    ("GptOssForCausalLM", "num_local_experts", 3, "num_experts_per_tok: expected at most num_local_experts=3"),
    ("GptOssForCausalLM", "layer_types", [WINDOWED], "layer_types: expected a list of 36 times"),
    ("GptOssForCausalLM", "sliding_window", None, "sliding_window: expected a number of keys"),
    ("GptOssForCausalLM", "attention_bias", "yes", "attention_bias: expected true or false"),
    ("GptOssForCausalLM", "rope_scaling", {"rope_type": "axial"}, "rope_scaling: rope_type: expected one of"),
    (
        "GptOssForCausalLM",
        "quantization_config",
        {"quant_method": "gptq"},
        "quantization_config: quant_method: expected 'mxfp4' for this architecture, found 'gptq'",
    ),
    (
        "GptOssForCausalLM",
        "quantization_config",
        {"quant_method": "mxfp4", "block_size": 16},
        "quantization_config: block_size: expected of mxfp4 only the fields",
    ),
    (
        "GptOssForCausalLM",
        "quantization_config",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.35.mlp"]},
        r"quantization_config: modules_to_not_convert: expected what leaves model\.layers\.35\.mlp\.experts in MXFP4",
    ),
    (
        "GptOssForCausalLM",
        "quantization_config",
        {"quant_method": "mxfp4", "modules_to_not_convert": "lm_head"},
        "quantization_config: modules_to_not_convert: expected a list of module names",
    ),
    ("Gemma4ForCausalLM", "hidden_activation", "gelu", "hidden_activation: expected 'gelu_pytorch_tanh'"),
    ("Gemma4ForCausalLM", "use_bidirectional_attention", "all", "use_bidirectional_attention: expected false"),
    ("Gemma4ForCausalLM", "enable_moe_block", True, "num_experts: expected a value"),
    ("Gemma4ForCausalLM", "enable_moe_block", "yes", "enable_moe_block: expected true or false"),
    ("Gemma4UnifiedForCausalLM", "enable_moe_block", True, "enable_moe_block: expected false for this architecture"),
    ("Gemma4ForCausalLM", "layer_types", WINDOWED, "layer_types: expected a list"),
    ("Gemma4ForCausalLM", "layer_types", [], "layer_types: expected a list of 30 times"),
    ("Gemma4ForCausalLM", "global_head_dim", 100, "global_head_dim: expected a multiple of 16"),
    ("Gemma4ForCausalLM", "num_kv_shared_layers", 30, "num_kv_shared_layers: expected less than num_hidden_layers=30"),
    ("Gemma4ForCausalLM", "num_kv_shared_layers", 25, "num_kv_shared_layers: expected a layer of each kind before"),
    ("Gemma4ForCausalLM", "vocab_size_per_layer_input", 99, "vocab_size_per_layer_input: expected at least vocab_size"),
    ("Gemma4ForCausalLM", "hidden_size_per_layer_input", 24, "hidden_size_per_layer_input: expected a multiple of 16"),
    ("Gemma4ForCausalLM", "per_layer_config", {"5": {"head_dim": 64}}, "per_layer_config: expected the same sizes for"),
    ("Gemma4ForCausalLM", "rope_parameters", {FULL: {}}, "rope_parameters: sliding_attention: expected the rope of"),
    ("Gemma4ForCausalLM", "rope_scaling", {"factor": 2.0}, "rope_scaling: expected null beside rope_parameters"),
    ("Gemma4ForCausalLM", "attention_k_eq_v", 1, "attention_k_eq_v: expected true or false"),
    ("Gemma4UnifiedForCausalLM", "hidden_size_per_layer_input", 256, "hidden_size_per_layer_input: expected 0 for"),
    ("Glm4ForCausalLM", "rope_scaling", {"rope_type": "dynamic"}, "rope_scaling: factor: expected a value"),
    ("Glm4ForCausalLM", "rope_scaling", {"rope_type": "dynamic", "factor": 0.5}, "rope_scaling: factor: expected at "),
    ("Glm4ForCausalLM", "rope_scaling", {"rope_type": "dynamic", "factor": 2, "alpha": 1000}, "rope_scaling: alpha"),
    (
        "Glm4ForCausalLM",
        "rope_scaling",
        {"rope_type": "proportional", "partial_rotary_factor": 1.5},
        "rope_scaling: partial_rotary_factor: expected at most 1",
    ),
]


def test_the_text_part_has_the_common_fields_of_the_whole() -> None:
    """An older config.json, in which most is left out."""
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
    spec: Any = parse_spec({**whole, "text_config": text}, {})
    assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.vocab_size) == (2560, 8, 4, 262208)
    assert (spec.checkpoint_dtype, spec.eos_token_ids, spec.tie_word_embeddings) == ("bfloat16", (1, 106), True)
    assert (spec.rope.scaling, spec.windowed_rope.scaling) == ("linear", "default")
    with pytest.raises(ModelError, match=r"config\.json: text_config: hidden_size: expected an integer"):
        parse_spec({**whole, "text_config": {"hidden_size": "64"}}, {})


@pytest.mark.parametrize(("architecture", "field", "value", "expected"), REFUSED)
def test_what_is_not_honoured_is_refused_by_name(architecture: str, field: str, value: object, expected: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {expected}"):
        parse_spec({"architectures": [architecture], "head_dim": 128, field: value}, {})


def test_either_name_of_the_text_part_is_known(checkpoints: Any, tmp_path: Path) -> None:
    """Older files have the model within the part, newer ones the part within the model."""
    for family in ("gemma3-multimodal", "mistral3-multimodal"):
        folder = tmp_path / family
        shutil.copytree(checkpoints(family).folder, folder)
        tensors = load_file(folder / "model.safetensors")
        model = load_model(worker_config(folder), load_spec(folder), INVARIANT).model
        names = {name.replace("language_model.model.", "model.language_model.") for name in tensors}
        assert names != set(tensors)
        renamed = {
            ("lm_head.weight" if name == "language_model.lm_head.weight" else "model." + name)
            .replace("model.language_model.model.", "model.language_model."): tensor
            for name, tensor in tensors.items()
        }  # fmt: skip
        save_file(renamed, folder / "model.safetensors")
        again = load_model(worker_config(folder), load_spec(folder), INVARIANT).model
        assert live_digest(again) == live_digest(model)


def test_layers_that_predict_more_tokens_are_not_read(checkpoints: Any, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(checkpoints("glm4-moe").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    digest = load_model(worker_config(folder), load_spec(folder), INVARIANT).facts.digest
    for layer, fits in ((3, True), (4, False)):
        save_file({**tensors, f"model.layers.{layer}.eh_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
        if fits:
            assert load_model(worker_config(folder), load_spec(folder), INVARIANT).facts.digest == digest
        else:
            with pytest.raises(TensorMismatch, match=r"model\.layers\.4\.eh_proj\.weight.: expected no such tensor"):
                load_model(worker_config(folder), load_spec(folder), INVARIANT)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_the_number_of_experts_has_two_names(architecture: str) -> None:
    names = {"architectures": [architecture]}
    for spelled in ({"num_experts": 64}, {"num_local_experts": 64}):
        spec: Any = parse_spec({**names, **spelled}, {})
        assert spec.num_experts == 64


def test_sizes_of_gemma_4_in_both_spellings() -> None:
    names = {"architectures": ["Gemma4ForCausalLM"], "num_hidden_layers": 4, "attention_k_eq_v": True}
    types = {"layer_types": [WINDOWED, FULL, WINDOWED, WINDOWED]}
    sizes = {"head_dim": 128, "num_key_value_heads": 2}
    by_layer = {**names, **types, "per_layer_config": {"01": sizes, "3": sizes}}
    by_kind = {**names, **types, "global_head_dim": 128, "num_global_key_value_heads": 2}
    spec: Any = parse_spec(by_kind, {})
    assert parse_spec(by_layer, {}) == spec
    # the last layer sees all keys whatever the config says
    assert [window is None for window in spec.windows] == [False, True, False, True]
    assert spec.kv_layers == (LayerKv(4, 256), LayerKv(2, 128)) * 2
    assert spec.largest_head_dim == 256
    # heads of their own only where keys are values
    other: Any = parse_spec({**by_kind, "attention_k_eq_v": False}, {})
    assert other.kv_layers[1] == LayerKv(4, 128)
    # transformers writes no sizes that are the common ones
    written = transformers.Gemma4TextConfig(global_head_dim=256).to_dict()
    assert written["per_layer_config"] == {}
    for uniform in ({}, None):
        same: Any = parse_spec({**written, **names, **types, "per_layer_config": uniform}, {})
        assert same.kv_layers == (LayerKv(4, 256),) * 4
    with pytest.raises(
        ModelError, match=r"per_layer_config: hidden_size: expected only head_dim and num_key_value_hea"
    ):
        parse_spec({**by_layer, "per_layer_config": {key: {"hidden_size": 64} for key in "13"}}, {})


def test_keys_and_values_that_layers_share_are_kept_once(config_of: Any) -> None:
    spec: Any = parse_spec(config_of("gemma4"), {})
    assert spec.sources == (None,) * 5 + (3, 3, 4)
    cache = PagedKvCache(spec.kv_layers, 2, 16, torch.float32)
    assert cache.nbytes == 2 * block_bytes(spec.kv_layers, 16, torch.float32)
    assert cache.nbytes == 2 * 2 * 16 * 4 * 2 * (3 * 32 + 2 * 64)
    assert all(cache.layers[layer] is cache.layers[source] for layer, source in ((5, 3), (6, 3), (7, 4)))
    small = spec.one_layer_per_kind()
    assert small.windows == (20, None, 20, None)
    assert small.sources == (None, None, 0, 1)


def test_tensors_of_layers_that_share_are_not_read(checkpoints: Any, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(checkpoints("gemma4").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    digest = load_model(worker_config(folder), load_spec(folder), INVARIANT).facts.digest
    for layer, fits in ((5, True), (8, False)):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        save_file({**tensors, name: torch.zeros(64, 64)}, folder / "model.safetensors")
        if fits:
            assert load_model(worker_config(folder), load_spec(folder), INVARIANT).facts.digest == digest
        else:
            with pytest.raises(TensorMismatch, match="expected no such tensor"):
                load_model(worker_config(folder), load_spec(folder), INVARIANT)
