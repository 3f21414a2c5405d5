"""fp8 models on a GPU: axes A1, A3, A5 and A6, the fingerprint, and a checkpoint in the compressed-tensors layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from fp8_checkpoints import write_tiny
from gpu_workload import KV_BLOCK_BYTES, launch_inproc, make_requests

from sempre.engine import LLM, SamplingParams
from sempre.engine.harness import Generation, compare_generations, generate
from sempre.ipc.messages import GetMetrics, MetricsReply

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["fp8", "fp8_weight_only"])
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(quantization: str) -> list[Generation]:
    """Each request by itself, kernel by kernel."""
    client = launch_inproc(quantization=quantization, enforce_eager=True, enable_prefix_caching=False)
    try:
        return [generate(client, [request])[0] for request in make_requests()]
    finally:
        client.close()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enforce_eager": True},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 33, "max_num_seqs": 24},
        {"max_num_batched_tokens": 1000},
    ],
    ids=str,
)
def test_batches_chunks_and_graphs(quantization: str, alone: list[Generation], settings: dict[str, Any]) -> None:
    client = launch_inproc(quantization=quantization, **settings)
    try:
        assert client.ready.fingerprint["quantization"] == f"{quantization}-1"
        assert client.ready.fingerprint["kernels"] == "all"
        comparison = compare_generations(alone, generate(client, make_requests()))
    finally:
        client.close()
    assert comparison.equal, comparison.first_difference


def test_preemption(quantization: str, alone: list[Generation]) -> None:
    requests = make_requests()
    short = [i for i, r in enumerate(requests) if len(r.prompt_token_ids) <= 600]
    settings = {"max_model_len": 1024, "max_num_seqs": 24, "kv_cache_memory_bytes": 90 * KV_BLOCK_BYTES}
    client = launch_inproc(quantization=quantization, **settings)
    try:
        run = generate(client, [requests[i] for i in short])
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    assert reply.values["num_preemptions"] > [0.0], "nothing was preempted"
    comparison = compare_generations([alone[i] for i in short], run)
    assert comparison.equal, comparison.first_difference


def test_control(quantization: str) -> None:
    """Ordinary matmuls give other bits in a batch: these tests can fail."""
    requests = make_requests()
    client = launch_inproc(quantization=quantization, numerics="control", enable_prefix_caching=False)
    try:
        lone = [generate(client, [request])[0] for request in requests]
        again = [msgspec.structs.replace(r, request_id=f"b-{r.request_id}") for r in requests]
        assert not compare_generations(lone, generate(client, again)).equal
    finally:
        client.close()


@pytest.mark.parametrize("scheme", ["fp8", "fp8_weight_only"])
def test_a_checkpoint_of_trained_weights(tmp_path: Path, scheme: str) -> None:
    """Scales made while loading and stored ones give the same tokens, most of them those of the unquantised model."""
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
    prompts = ["It was a dark and stormy night, and the", "Call me Ishmael. Some years ago"]
    settings: dict[str, Any] = {"device": "cuda", "multiprocessing": False, "max_model_len": 512}
    results = []
    models = [("tiny", scheme), (str(write_tiny(tmp_path, scheme, "channel")), None), ("tiny", None)]
    for model, quantization in models:
        with LLM(model, quantization=quantization, **settings) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert results[0] == results[1]
    pairs = [p for a, b in zip(results[0], results[2], strict=True) for p in zip(a[0], b[0], strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.4 * len(pairs), pairs
