"""A whole GPU worker without a GPU: Triton's interpreter computes, and the tokens are those of a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_settings import worker_config

from sempre.ipc.messages import (
    ExecuteStep,
    LoadModel,
    NewRequest,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StartServing,
)
from sempre.workers import worker as worker_module
from sempre.workers.worker import Worker

# each runs minutes of interpretation
pytestmark = pytest.mark.product

CPU = torch.device("cpu")
PROMPT = list(range(3, 23))
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}

EXTRA: dict[str, dict[str, object]] = {
    "MistralForCausalLM": {"sliding_window": 9},
    "Gemma2ForCausalLM": {"sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3ForCausalLM": {"sliding_window": 9, "sliding_window_pattern": 2},
    "GptOssForCausalLM": {"sliding_window": 9, "num_local_experts": 5, "num_experts_per_tok": 3},
    "GraniteForCausalLM": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.5},
    "MixtralForCausalLM": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "Olmo3ForCausalLM": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen2MoeForCausalLM": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
    },
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_group": 3,
        "topk_group": 2,
        "use_qk_norm": True,
    },
    "Qwen3_5ForCausalLM": {
        "full_attention_interval": 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "Qwen3MoeForCausalLM": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}


def _tokens(folder: Path, **changes: object) -> list[SampledTokens]:
    config = worker_config(
        folder,
        dtype="float32",
        load_format="dummy",
        max_model_len=40,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_bytes=1 << 20,
        enforce_eager=True,
        device="cpu",
        **changes,  # type: ignore[arg-type]
    )
    worker = Worker()
    num_slots = worker.load_model(LoadModel(config=config)).available_state_slots
    worker.start_serving(StartServing(num_blocks=20, num_state_slots=num_slots))
    params = SamplingSpec(max_tokens=4, temperature=1.0, logprobs=2, prompt_logprobs=1)
    new = NewRequest(request_id="a", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), seed=5, params=params)
    found, slots = [], (2, 2, 0, 0)
    for step in range(4):
        computed = 0 if step == 0 else len(PROMPT) + step - 1
        scheduled = ScheduledRequest(
            request_id="a",
            num_computed_tokens=computed,
            num_tokens=1 if step else len(PROMPT),
            block_table_start=2 if step else 0,
            block_ids=[] if step else [3, 1],
            # a snapshot within the prompt, and the state after each step, in place or not
            state_read=slots[step - 1] if num_slots and step else -1,
            state_writes=_writes(step, slots[step]) if num_slots else [],
        )
        command = ExecuteStep(step_id=step, new_requests=[] if step else [new], scheduled=[scheduled])
        worker.submit(command)
        found += worker.collect().sampled
    worker.shutdown()
    return found


def _writes(step: int, slot: int) -> list[tuple[int, int]]:
    return [(0, slot)] if step else [(15, 1), (len(PROMPT) - 1, slot)]


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        ("LlamaForCausalLM", None),
        ("LlamaForCausalLM", "fp8_weight_only"),
        ("MistralForCausalLM", None),
        ("Qwen2ForCausalLM", None),
        ("Qwen3ForCausalLM", None),
        ("Qwen3MoeForCausalLM", None),
        pytest.param("Qwen3_5ForCausalLM", None, marks=pytest.mark.timeout(900)),
        ("Qwen3MoeForCausalLM", "fp8_weight_only"),
        ("Glm4ForCausalLM", None),
        ("Glm4MoeForCausalLM", None),
        ("MixtralForCausalLM", None),
        ("Qwen2MoeForCausalLM", None),
        ("Gemma2ForCausalLM", None),
        ("Gemma3ForCausalLM", None),
        ("GptOssForCausalLM", None),
        ("GraniteForCausalLM", None),
        ("Olmo3ForCausalLM", None),
        ("Phi3ForCausalLM", "fp8_weight_only"),
        ("SmolLM3ForCausalLM", None),
    ],
)
def test_tokens_are_those_of_a_cpu(
    architecture: str, quantization: str | None, gpu_backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = EXTRA.get(architecture, {})
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **extra, "architectures": [architecture]}))
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "make_backend", lambda *_: gpu_backend)
        found = _tokens(tmp_path, quantization=quantization)
    monkeypatch.undo()
    expected = _tokens(tmp_path, quantization=quantization)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    assert all(result.error is None for result in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
