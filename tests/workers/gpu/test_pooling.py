"""A whole GPU worker that pools, without a GPU: Triton's interpreter computes, and the results are those of a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from no_gpu import without_gpu
from pooling_checkpoints import FLAGS, write_pooling
from worker_settings import worker_config

from sempre.ipc.messages import (
    ExecuteStep,
    LoadModel,
    NewRequest,
    PoolingSpec,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StartServing,
)
from sempre.workers import worker as worker_module
from sempre.workers.worker import Worker

# minutes of interpretation
pytestmark = pytest.mark.product

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "tie_word_embeddings": True,
}
PROMPTS = {"a": list(range(3, 23)), "b": [5, 9, 50]}
# of two requests, the first one's prompt in two chunks
STEPS = ((("a", 0, 12, [3]),), (("b", 0, 3, [5]), ("a", 12, 8, [1])))


def pooled(folder: Path) -> list[SampledTokens]:
    settings = {"max_model_len": 40, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    config = worker_config(
        folder, dtype="float32", load_format="dummy", kv_cache_memory_bytes=1 << 20, device="cpu", **settings
    )
    worker = Worker()
    worker.load_model(LoadModel(config=config))
    worker.start_serving(StartServing(num_blocks=20))
    found: list[SampledTokens] = []
    known: set[str] = set()
    for number, items in enumerate(STEPS):
        new = [name for name, *_ in items if name not in known]
        known.update(new)
        command = ExecuteStep(
            step_id=number,
            new_requests=[
                NewRequest(
                    request_id=name,
                    token_ids=PROMPTS[name],
                    num_prompt_tokens=len(PROMPTS[name]),
                    seed=0,
                    params=SamplingSpec(max_tokens=1),
                    pooling=PoolingSpec(),
                )
                for name in new
            ],
            scheduled=[
                ScheduledRequest(
                    request_id=name,
                    num_computed_tokens=start,
                    num_tokens=count,
                    block_table_start=1 if start else 0,
                    block_ids=blocks,
                )
                for name, start, count, blocks in items
            ],
        )
        worker.submit(command)
        found += worker.collect().sampled
    worker.shutdown()
    return found


@pytest.mark.parametrize("kind", [*FLAGS, "classify"])
def test_results_are_those_of_a_cpu(
    kind: str,
    gpu_backend: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sempre.workers.gpu import backend, pooling_runner

    architecture = "Qwen3ForSequenceClassification" if kind == "classify" else "Qwen3ForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": [architecture]}))
    if kind != "classify":
        write_pooling(tmp_path, {f"pooling_mode_{flag}": name == kind for name, flag in FLAGS.items()})
    without_gpu(monkeypatch, pooling_runner)
    monkeypatch.setattr(backend, "require_equal", lambda comparisons: {str(c): 1 for c in comparisons})
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "make_backend", lambda *_: gpu_backend)
        found = pooled(tmp_path)
    monkeypatch.undo()
    expected = pooled(tmp_path)
    assert [result.request_id for result in found] == ["a", "b", "a"]
    assert found[0].pooled is None
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.pooled is not None
        assert theirs.pooled is not None
        a, b = (torch.from_numpy(np.frombuffer(each, "<f4").copy()) for each in (ours.pooled, theirs.pooled))
        assert float((a - b).norm() / b.norm()) < 1e-5
