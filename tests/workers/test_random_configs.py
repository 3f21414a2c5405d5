"""Configs of any sizes, a function of a number: each family computes what transformers computes, in chunks or whole."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sempre.ipc.messages import SamplingSpec
from sempre.workers.models.registry import FILES

GENERATING = [architecture for architecture in FILES if architecture.endswith("ForCausalLM")]
SCORED = SamplingSpec(max_tokens=3, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
WINDOWED, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 2.5, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 900.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 48}  # fmt: skip


def config_of(architecture: str, number: int) -> Any:
    """A config of this architecture; equal numbers give equal ones."""
    r = random.Random(f"{architecture} {number}")
    heads = r.choice((1, 2, 3, 4, 6))
    layers = r.randint(1, 4)
    fields: dict[str, Any] = {
        "vocab_size": r.choice((37, 320, 333)),
        "hidden_size": heads * r.choice((16, 32, 48)),
        "intermediate_size": r.choice((16, 48, 144)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": r.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rms_norm_eps": r.choice((1e-6, 1e-5, 1e-3)),
        "tie_word_embeddings": r.random() < 0.5,
        "attention_bias": r.random() < 0.5,
        "rope_parameters": r.choice(({"rope_type": "default", "rope_theta": 400.0}, YARN, LINEAR_ROPE, LLAMA3)),
    }
    family = architecture.removesuffix("ForCausalLM")
    extra = OF_FAMILY[family](r, layers)
    fields |= {name: value for name, value in extra.items() if value is not None}
    for name in [name for name, value in extra.items() if value is None]:
        fields.pop(name, None)
    # it writes into what it is given
    return getattr(transformers, architecture).config_class(**copy.deepcopy(fields))


def _head_dim(r: random.Random, *more: int) -> int:
    return r.choice((16, 32, 48, *more))


def _types(r: random.Random, layers: int, *kinds: str) -> list[str]:
    types = [r.choice(kinds) for _ in range(layers)]
    types[r.randrange(layers)] = FULL
    return types


def _ropes(r: random.Random) -> dict[str, Any]:
    default = {"rope_type": "default", "rope_theta": 200.0}
    return {WINDOWED: r.choice((default, LINEAR_ROPE)), FULL: r.choice((default, YARN, LINEAR_ROPE))}


def _llama(r: random.Random, layers: int) -> dict[str, Any]:
    return {"head_dim": _head_dim(r, 80), "mlp_bias": r.random() < 0.5}


def _windowed(r: random.Random, layers: int) -> dict[str, Any]:
    return {"head_dim": _head_dim(r, 80), "sliding_window": r.choice((7, 24, 500)), "attention_bias": None}


def _upper(r: random.Random, layers: int) -> dict[str, Any]:
    return {"use_sliding_window": r.random() < 0.5, "sliding_window": 19, "max_window_layers": r.randint(0, layers)}


def _experts(r: random.Random) -> dict[str, Any]:
    count = r.randint(2, 9)
    return {
        "num_experts": count,
        "num_experts_per_tok": r.randint(1, count),
        "moe_intermediate_size": r.choice((16, 48)),
        "norm_topk_prob": r.random() < 0.5,
    }


def _some_sparse(r: random.Random, layers: int) -> dict[str, Any]:
    return {"decoder_sparse_step": r.randint(1, 2), "mlp_only_layers": r.sample(range(layers), r.randint(0, 1))}


def _delta(r: random.Random, layers: int) -> dict[str, Any]:
    keys = r.randint(1, 3)
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * r.randint(1, 3),
        "linear_key_head_dim": r.choice((16, 32)),
        "linear_value_head_dim": r.choice((16, 48)),
        "linear_conv_kernel_dim": r.randint(2, 4),
        "layer_types": _types(r, layers, FULL, LINEAR, LINEAR),
        "head_dim": _head_dim(r),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 300.0,
            "partial_rotary_factor": r.choice((0.25, 0.5)),
        },
        # twice as much, and its layers amplify rounding
        "initializer_range": 0.05,
    }


def _gemma(r: random.Random, layers: int) -> dict[str, Any]:
    return {
        "head_dim": _head_dim(r, 80),
        "query_pre_attn_scalar": r.choice((10, 24, 256)),
        "sliding_window": r.choice((7, 20)),
        "final_logit_softcapping": r.choice((3.0, 30.0)),
    }


def _gemma4(r: random.Random, layers: int) -> dict[str, Any]:
    types = _types(r, layers, FULL, WINDOWED)
    types[-1] = FULL
    per_layer = r.choice((0, 16))
    # a layer of each kind before those that share; without embeddings for each layer, transformers fails to share
    shared = 1 if per_layer and FULL in types[:-1] else 0
    return {
        **_gemma(r, layers),
        "query_pre_attn_scalar": None,
        "global_head_dim": _head_dim(r, 64),
        "attention_k_eq_v": r.random() < 0.5,
        "num_global_key_value_heads": 1,
        "layer_types": types,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": r.random() < 0.5,
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": 333,
        "rope_parameters": {
            WINDOWED: {"rope_type": "default", "rope_theta": 200.0},
            FULL: {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": r.choice((0.25, 0.5))},
        },
    }


def _glm4_moe(r: random.Random, layers: int) -> dict[str, Any]:
    groups = r.randint(1, 3)
    kept = r.randint(1, groups)
    return {
        "n_routed_experts": groups * 3,
        "num_experts_per_tok": r.randint(1, 3 * kept),
        "n_group": groups,
        "topk_group": kept,
        "moe_intermediate_size": r.choice((16, 48)),
        "n_shared_experts": r.randint(1, 2),
        "routed_scaling_factor": r.choice((1.0, 2.5)),
        "norm_topk_prob": r.random() < 0.5,
        "use_qk_norm": r.random() < 0.5,
        "first_k_dense_replace": r.randint(0, layers),
        "num_nextn_predict_layers": 0,
        "head_dim": _head_dim(r),
    }


OF_FAMILY: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "Llama": _llama,
    "Mistral": _windowed,
    "Qwen2": lambda r, layers: {**_upper(r, layers), "attention_bias": None},
    "Qwen3": lambda r, layers: {**_upper(r, layers), "head_dim": _head_dim(r, 80)},
    "Qwen3Moe": lambda r, layers: {"head_dim": _head_dim(r), **_experts(r), **_some_sparse(r, layers)},
    "Qwen2Moe": lambda r, layers: {
        **_experts(r), **_some_sparse(r, layers), "shared_expert_intermediate_size": r.choice((16, 80)),
        "qkv_bias": r.random() < 0.5, "attention_bias": None,
    },
    "Qwen3_5": _delta,
    "Qwen3_5Moe": lambda r, layers: {
        **_delta(r, layers), **_experts(r), "norm_topk_prob": None,
        "shared_expert_intermediate_size": r.choice((16, 80)),
    },
    "Qwen3Next": lambda r, layers: {
        **_delta(r, layers), **_experts(r), **_some_sparse(r, layers),
        "shared_expert_intermediate_size": r.choice((16, 80)),
    },
    "Mixtral": lambda r, layers: {
        **_windowed(r, layers), "num_local_experts": 5, "num_experts_per_tok": r.randint(1, 5),
    },
    "Glm": lambda r, layers: {"head_dim": _head_dim(r, 80)},
    "Glm4": lambda r, layers: {"head_dim": _head_dim(r, 80)},
    "Glm4Moe": _glm4_moe,
    "Gemma2": lambda r, layers: {**_gemma(r, layers), "attn_logit_softcapping": r.choice((2.0, None, 50.0))},
    "Gemma3": lambda r, layers: {
        **_gemma(r, layers), "layer_types": _types(r, layers, FULL, WINDOWED), "rope_parameters": _ropes(r),
    },
    "GptOss": lambda r, layers: {
        "head_dim": _head_dim(r), "num_local_experts": 5, "num_experts_per_tok": r.randint(1, 5),
        "sliding_window": r.choice((7, 20)), "layer_types": _types(r, layers, FULL, WINDOWED),
    },
    "Gemma4": _gemma4,
    "Gemma4Unified": lambda r, layers: {
        **_gemma4(r, layers), "hidden_size_per_layer_input": None, "vocab_size_per_layer_input": None,
    },
    "Granite": lambda r, layers: {
        "mlp_bias": r.random() < 0.5, "embedding_multiplier": r.choice((0.5, 3.0)),
        "attention_multiplier": r.choice((0.1, 0.3)), "residual_multiplier": r.choice((0.22, 1.0)),
        "logits_scaling": r.choice((0.5, 8.0)),
    },
    "Olmo2": lambda r, layers: {},
    "Olmo3": lambda r, layers: {
        "sliding_window": r.choice((7, 20)), "layer_types": _types(r, layers, FULL, WINDOWED),
        "rope_parameters": _ropes(r),
    },
    "Phi3": lambda r, layers: {
        "sliding_window": r.choice((7, 24, None)), "partial_rotary_factor": r.choice((0.5, 1.0)),
        "rope_parameters": {"rope_type": "default", "rope_theta": 400.0}, "attention_bias": None,
    },
    "SmolLM3": lambda r, layers: {
        "mlp_bias": r.random() < 0.5, "no_rope_layers": [r.randint(0, 1) for _ in range(layers)],
        "use_sliding_window": (windowed := r.random() < 0.5), "sliding_window": 20 if windowed else None,
    },
}  # fmt: skip


def check(config: Any, folder: Path, tools: Any) -> None:
    """Logits of transformers, in prompts of any length; the same bits in other chunks."""
    checkpoint_of, serve, dense, prompt = tools
    checkpoint = checkpoint_of(config, folder)
    serving = serve(folder)
    rng = np.random.default_rng(3)
    for length in (1, 2, 47, 90):
        ids = rng.integers(3, config.vocab_size, length).tolist()
        whole = serving.run(prompt("whole", ids, SCORED))["whole"]
        cut = serving.run(prompt("cut", ids, SCORED, chunks=(5, 1, 19)))["cut"]
        assert whole.errors == cut.errors == []
        assert whole.token_ids == cut.token_ids
        parts = [part for part in (whole.prompt_logprobs, whole.logprobs) if part]
        found = torch.cat([dense(part, config.vocab_size) for part in parts])
        others = [part for part in (cut.prompt_logprobs, cut.logprobs) if part]
        assert torch.equal(torch.cat([dense(part, config.vocab_size) for part in others]), found)
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([ids + whole.token_ids])).logits[0][:-1]
        expected = logits.double().log_softmax(-1)
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < 1e-5, (error, config)


@pytest.mark.product
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", GENERATING)
def test_any_config_computes_what_transformers_does(
    architecture: str, tmp_path: Path, checkpoint_of: Any, serve: Any, dense: Any, prompt: Any
) -> None:
    for number in range(8):
        check(config_of(architecture, number), tmp_path / str(number), (checkpoint_of, serve, dense, prompt))


def test_every_family_has_its_configs() -> None:
    assert {architecture.removesuffix("ForCausalLM") for architecture in GENERATING} == set(OF_FAMILY)
    for architecture in GENERATING:
        first, again, other = (config_of(architecture, number).to_dict() for number in (0, 0, 1))
        assert first == again != other
