"""A whole GPU worker in Triton's interpreter, whose requests begin with the same blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows_summed_alone import sum_rows_alone
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

# minutes of interpretation
pytestmark = [pytest.mark.product, pytest.mark.timeout(900)]

SPLIT, BLOCK = 64, 16
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    # one layer sees all keys, the other does not
    "sliding_window": 9,
    "attn_logit_softcapping": 2.0,
}
PREFIX = [3 + 7 * at % 90 for at in range(SPLIT)]
# request, tokens after the prefix, blocks after the shared ones
REQUESTS = {"a": ([5, 6, 7], 10), "b": ([8, 9], 11), "c": ([10], 12)}
DECODE_STEPS = 2


def _scheduled(name: str, step: int) -> ScheduledRequest:
    rest, block = REQUESTS[name]
    length = SPLIT + len(rest)
    if step:
        return ScheduledRequest(
            request_id=name, num_computed_tokens=length + step - 1, num_tokens=1, block_table_start=5, block_ids=[]
        )
    # the first request computes the prefix, the others find it
    computed = 0 if name == "a" else SPLIT
    return ScheduledRequest(
        request_id=name,
        num_computed_tokens=computed,
        num_tokens=length - computed,
        block_table_start=0,
        block_ids=[2, 0, 3, 1, block],
    )


def _run(folder: Path) -> list[SampledTokens]:
    config = worker_config(
        folder,
        dtype="float32",
        load_format="dummy",
        max_model_len=160,
        max_num_seqs=4,
        max_num_batched_tokens=96,
        kv_cache_memory_bytes=1 << 20,
        enforce_eager=True,
        device="cpu",
    )
    worker = Worker()
    worker.load_model(LoadModel(config=config))
    worker.start_serving(StartServing(num_blocks=20))
    params = SamplingSpec(max_tokens=9, temperature=1.0, logprobs=2)
    new = [
        NewRequest(
            request_id=name,
            token_ids=PREFIX + rest,
            num_prompt_tokens=SPLIT + len(rest),
            seed=ord(name),
            params=params,
        )
        for name, (rest, _) in REQUESTS.items()
    ]
    steps = [
        (new[:1], [_scheduled("a", 0)]),
        (new[1:], [_scheduled(name, 0) for name in "bc"]),
        *(([], [_scheduled(name, step) for name in REQUESTS]) for step in range(1, 1 + DECODE_STEPS)),
    ]
    found: list[SampledTokens] = []
    for step_id, (added, scheduled) in enumerate(steps):
        worker.submit(ExecuteStep(step_id=step_id, new_requests=added, scheduled=scheduled))
        found += worker.collect().sampled
    worker.shutdown()
    return found


def test_reading_a_prefix_once_changes_no_bit(
    gpu_backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sempre.kernels.attention import gpu, gpu_prefix
    from sempre.workers.gpu import shared_splits, step_buffers

    sum_rows_alone(monkeypatch)
    monkeypatch.setattr(worker_module, "make_backend", lambda *_: gpu_backend)
    for module in (gpu, gpu_prefix, shared_splits, step_buffers):
        monkeypatch.setattr(module, "SPLIT", SPLIT)
    counts = []
    attend = gpu_prefix.paged_attention

    def noted(qkv: Any, cache: Any, batch: Any, *others: Any) -> Any:
        counts.append(batch.prefixes.counts.tolist())
        return attend(qkv, cache, batch, *others)

    monkeypatch.setattr(gpu_prefix, "paged_attention", noted)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    expected = _run(tmp_path)
    assert not counts, "so few keys do not pay"
    monkeypatch.setattr(shared_splits, "LEAST_SAVED", 1)
    found = _run(tmp_path)
    assert counts == [[1, 1, 1]] * DECODE_STEPS, "only the layer that sees all keys"
    assert all(result.error is None and result.token_ids for result in found)
    assert found == expected
