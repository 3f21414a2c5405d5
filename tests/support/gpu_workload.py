"""A small model of random weights, whose logits are real ones, and requests for it. Imported by the GPU tests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Generation, generate, make_request
from sempre.ipc.messages import RequestSpec

VOCAB_SIZE = 8192
# the last two layers see a window; (K=4096 in down_proj) is where an ordinary library splits K for few rows
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.04,
    "intermediate_size": 4096,
    "max_position_embeddings": 8192,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "sliding_window": 700,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": True,
    "vocab_size": VOCAB_SIZE,
}
# what is unlike the model above: caps so low that they bend what is computed; few experts of an odd number, and a layer
# without
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 256,
        "num_attention_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 256,
        "num_attention_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_pattern": 3,
        "final_logit_softcapping": 4.0,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "head_dim": 64,
        "num_attention_heads": 16,
        "num_local_experts": 19,
        "num_experts_per_tok": 4,
        "intermediate_size": 336,
        "sliding_window": 128,
        "rope_theta": 150000,
    },
    "gemma4": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "rope_theta": None,
        "final_logit_softcapping": 4.0,
    },
    "gemma4-keys-are-values": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "rope_theta": None,
    },
    "qwen3.5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "num_key_value_heads": 1,
        "head_dim": 256,
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 48,
    },
    "qwen3.5-moe": {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_key_value_heads": 1,
        "head_dim": 256,
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 128,
        "num_experts": 43,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 336,
        "shared_expert_intermediate_size": 1008,
    },
    "gemma4-moe": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 1008,
        "enable_moe_block": True,
        "num_experts": 19,
        "top_k_experts": 4,
        "moe_intermediate_size": 336,
        "rope_theta": None,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "olmo3": {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "rope_theta": 500000},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": None,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 336,
    },
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "use_sliding_window": False,
        "num_experts": 43,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 336,
        "shared_expert_intermediate_size": 1008,
        "mlp_only_layers": [1],
    },
    "glm4": {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"},
    "glm4-moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": 40,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 336,
        "n_group": 5,
        "topk_group": 3,
        "use_qk_norm": True,
        "routed_scaling_factor": 2.5,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "use_sliding_window": False,
        "num_experts": 43,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 336,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
KV_BLOCK_BYTES = 2 * 4 * 2 * 128 * 16 * 2  # k and v, 4 layers, 2 heads, 128 dimensions, 16 tokens, bfloat16
SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "load_format": "dummy",
    "max_model_len": 8192,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "kv_cache_memory_bytes": 6000 * KV_BLOCK_BYTES,
}
OUTPUT_TOKENS = 24


@cache
def model_folder(family: str | None = None) -> str:
    """A folder with the config.json of the model, or of one of FAMILIES; the weights are dummies."""
    folder = Path(tempfile.mkdtemp(prefix="sempre-gpu-model-"))
    (folder / "config.json").write_text(json.dumps(CONFIG | (FAMILIES[family] if family is not None else {})))
    return str(folder)


def prompt(start: int, length: int) -> list[int]:
    return [3 + (start * 7919 + j * 104729 + j * j * 31) % (VOCAB_SIZE - 8) for j in range(length)]


def make_requests(count: int = 24) -> list[RequestSpec]:
    """Prompts of 1 to 4,000 tokens, some with a common beginning, under every kind of sampling."""
    shared = prompt(1, 80)
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (prompt(2, 1), {"temperature": 0.0}),
        (prompt(3, 5), {"temperature": 1.0}),
        (prompt(4, 17), {"temperature": 0.7, "top_p": 0.9}),
        (prompt(5, 64), {"temperature": 1.3, "top_k": 40}),
        (prompt(6, 65), {"temperature": 1.0, "min_p": 0.05, "prompt_logprobs": 3}),
        (prompt(7, 511), {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4}),
        (prompt(8, 1500), {"temperature": 1.0, "presence_penalty": 0.7, "top_k": 100, "top_p": 0.95}),
        (shared + prompt(9, 3), {"temperature": 0.0, "prompt_logprobs": 0}),
        (shared + prompt(10, 20), {"temperature": 1.0}),
        (shared + prompt(11, 40), {"temperature": 1.0, "logit_bias": {17: 2.5, 99: -3.0}, "min_tokens": 5}),
        (shared, {"temperature": 0.8, "bad_words_token_ids": [[11], [12, 13]]}),
        (prompt(12, 200), {"temperature": 1.0, "allowed_token_ids": list(range(100, 900))}),
        (prompt(13, 4000), {"temperature": 1.0}),
        (prompt(14, 1017), {"temperature": 0.0}),
    ]
    plain = [(prompt(20 + i, 3 + 37 * i % 600), {"temperature": 1.0 if i % 3 else 0.0}) for i in range(count)]
    return [
        make_request(tokens, seed=1000 + i, ordinal=i, max_tokens=OUTPUT_TOKENS, **({"logprobs": 4} | sampling))
        for i, (tokens, sampling) in enumerate([*kinds, *plain][:count])
    ]


def launch_inproc(**settings: Any) -> InprocClient:
    return InprocClient.launch(
        engine_config(**(SETTINGS | {"model": model_folder(), "multiprocessing": False} | settings))
    )


def run_inproc(requests: Sequence[RequestSpec], **settings: Any) -> list[Generation]:
    """All requests at once, in an engine of this process."""
    client = launch_inproc(**settings)
    try:
        return generate(client, requests)
    finally:
        client.close()


@cache
def run_alone(count: int = 24, numerics: str = "invariant") -> tuple[Generation, ...]:
    """Every request by itself, one after the other, without a prefix cache and without graphs."""
    client = launch_inproc(enable_prefix_caching=False, enforce_eager=True, numerics=numerics)
    try:
        return tuple(generate(client, [request])[0] for request in make_requests(count))
    finally:
        client.close()
