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

from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.rope import RopeSpec
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.loading import load_model
from sempre.workers.models.registry import load_spec, parse_spec

GREEDY = SamplingSpec(max_tokens=64, temperature=0.0, logprobs=-1, prompt_logprobs=-1)

FAMILIES = [
    "qwen3-moe-odd", "qwen3-moe-step", "qwen2-moe", "qwen2-moe-odd", "mixtral", "mixtral-odd",
    "glm", "glm4", "glm4-odd", "glm4-moe", "glm4-moe-odd",
    "llama-yarn-rope", "smollm3", "smollm3-odd", "granite", "granite-odd", "olmo2", "olmo2-odd", "olmo3", "olmo3-odd",
    "phi3", "phi3-long",
    "phi3-part", "gemma3", "gemma3-odd",
    "gemma3-multimodal", "gpt-oss", "gpt-oss-odd",
]  # fmt: skip
WINDOWED = "sliding_attention"


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


DEFAULTS = {
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "Qwen2MoeForCausalLM": transformers.Qwen2MoeConfig,
    "Qwen3_5ForCausalLM": transformers.Qwen3_5TextConfig,
    "Qwen3_5MoeForCausalLM": transformers.Qwen3_5MoeTextConfig,
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
    ("Olmo3ForCausalLM", "sliding_window", None, "sliding_window: expected a value"),
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
    ("GptOssForCausalLM", "sliding_window", None, "sliding_window: expected a value"),
    ("GptOssForCausalLM", "attention_bias", "yes", "attention_bias: expected true or false"),
    ("GptOssForCausalLM", "rope_scaling", {"rope_type": "dynamic"}, "rope_scaling: rope_type: expected one of"),
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
