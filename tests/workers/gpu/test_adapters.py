"""Adapters in a whole GPU worker without a GPU: Triton's interpreter computes, and the results are those of a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import adapter_spec, save_adapter
from worker_settings import worker_config

from sempre.ipc.messages import (
    AdapterSpec,
    ExecuteStep,
    LoadModel,
    NewRequest,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StartServing,
)
from sempre.kernels.lora import LoraShape, LoraSlots
from sempre.workers import worker as worker_module
from sempre.workers.adapters import store
from sempre.workers.worker import Worker

# minutes of interpretation
pytestmark = pytest.mark.product

PROMPT = list(range(3, 12))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
MODULES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.v_proj": (16, 32),
    "model.layers.0.self_attn.o_proj": (32, 32),
    "model.layers.0.mlp.gate_proj": (48, 32),
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
}


def _results(folder: Path, adapters: list[AdapterSpec | None]) -> list[list[SampledTokens]]:
    """A step with all prompts, then two of single tokens, of one request for each of `adapters`."""
    config = worker_config(
        folder,
        dtype="float32",
        load_format="dummy",
        max_model_len=32,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=1 << 20,
        enforce_eager=True,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
    )
    worker = Worker()
    worker.load_model(LoadModel(config=config))
    worker.start_serving(StartServing(num_blocks=20))
    params = SamplingSpec(max_tokens=4, temperature=1.0, logprobs=2, prompt_logprobs=1)
    found = []
    for step in range(3):
        computed = 0 if step == 0 else len(PROMPT) + step - 1
        scheduled = [
            ScheduledRequest(
                request_id=f"{place}",
                num_computed_tokens=computed,
                num_tokens=1 if step else len(PROMPT),
                block_table_start=1 if step else 0,
                block_ids=[] if step else [place + 3],
            )
            for place in range(len(adapters))
        ]
        new = [
            NewRequest(
                request_id=f"{place}",
                token_ids=PROMPT,
                num_prompt_tokens=len(PROMPT),
                seed=5,
                params=params,
                adapter=adapter,
            )
            for place, adapter in enumerate(adapters)
        ]
        worker.submit(ExecuteStep(step_id=step, new_requests=[] if step else new, scheduled=scheduled))
        found.append(worker.collect().sampled)
    worker.shutdown()
    return found


def _values(results: list[list[SampledTokens]]) -> np.ndarray:
    """All log-probabilities."""
    rows = [part for step in results for each in step for part in (each.prompt_logprobs, each.logprobs)]
    return np.concatenate([np.frombuffer(part.logprobs, "<f4") for part in rows if part is not None])


def test_results_are_those_of_a_cpu(gpu_backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sempre.kernels.lora.gpu import GpuLoraSlots

    def gpu_slots(shape: LoraShape, dtype: torch.dtype, device: torch.device) -> LoraSlots:
        return GpuLoraSlots(shape, dtype, device)

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    specs = [adapter_spec(save_adapter(tmp_path / f"{n}", MODULES, rank=8 - n, seed=n, size=0.5)) for n in range(2)]
    adapters = [specs[0], None, specs[1]]
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "make_backend", lambda *_: gpu_backend)
        patch.setattr(store, "make_slots", gpu_slots)
        found = _results(tmp_path, adapters)
    monkeypatch.undo()
    expected, plain = _results(tmp_path, adapters), _results(tmp_path, [None] * 3)
    assert [[each.error for each in step] for step in found] == [[None] * 3] * 3
    assert [[each.token_ids for each in step] for step in found] == [[e.token_ids for e in step] for step in expected]
    difference = np.abs(_values(found) - _values(expected)).max()
    assert difference < 1e-4
    # a control: the adapters are seen
    assert np.abs(_values(found) - _values(plain)).max() > 100 * difference
