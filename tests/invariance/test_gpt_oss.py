"""Axes A1 to A9 and A15 of gpt-oss: sinks, windows, and experts with biases; with a control that must fail."""

from __future__ import annotations

import json
import shutil
from functools import cache
from typing import Any

import msgspec
import pytest
from tiny_variants import TINY
from workload import SETTINGS, launch_inproc, make_requests

from sempre.engine.harness import Cluster, Generation, compare_generations, generate
from sempre.ipc.messages import GetMetrics, MetricsReply, RequestSpec

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 50,
    "max_position_embeddings": 512,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False},
    "initializer_range": 0.2,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
KV_BLOCK_BYTES = 2 * 4 * 2 * 32 * 16 * 2  # k and v, 4 layers, 2 heads, 32 dimensions, 16 tokens, bfloat16
# every kind of prompt and of sampling, half of each
REQUESTS = make_requests()[::2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The engine's settings: random weights, with the tokenizer of `tiny`."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    for path in TINY.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {"model": str(folder), "load_format": "dummy"}


@cache
def alone(folder: str, numerics: str) -> list[Generation]:
    """Every request by itself."""
    client = launch_inproc(model=folder, load_format="dummy", numerics=numerics, enable_prefix_caching=False)
    try:
        return [generate(client, [request])[0] for request in REQUESTS]
    finally:
        client.close()


def check(model: dict[str, Any], found: list[Generation], numerics: str = "invariant") -> None:
    comparison = compare_generations(alone(model["model"], numerics), found)
    if numerics == "invariant":
        assert comparison.equal, comparison.first_difference
    else:
        assert not comparison.equal, "the control gave equal bits: these tests could not notice a difference"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"numerics": "control"},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 33, "max_num_seqs": 12},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
    ],
    ids=str,
)
def test_batches_chunks_and_speculation(model: dict[str, Any], settings: dict[str, Any]) -> None:
    """A1, A2, A3 and A9: in reverse order of arrival, too."""
    numerics = settings.get("numerics", "invariant")
    for backwards in (False, True):
        client = launch_inproc(**model, **settings)
        count = len(REQUESTS)
        order = (
            [msgspec.structs.replace(r, ordinal=count - r.ordinal) for r in REQUESTS[::-1]] if backwards else REQUESTS
        )
        try:
            found = generate(client, order)
        finally:
            client.close()
        check(model, found[::-1] if backwards else found, numerics)


def test_prefix_cache_and_preemption(model: dict[str, Any]) -> None:
    """A4 and A5: cold, warm and partly evicted, in fewer blocks than the requests fill together."""

    def named(number: int) -> list[RequestSpec]:
        return [msgspec.structs.replace(r, request_id=f"{number}-{r.request_id}") for r in REQUESTS]

    client = launch_inproc(**model, kv_cache_memory_bytes=34 * KV_BLOCK_BYTES, max_num_seqs=12)
    try:
        rounds = [generate(client, named(number)) for number in range(3)]
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    assert reply.values["num_preemptions"] > [0.0]
    assert sum(run.num_cached_tokens for run in rounds[2]) > 0
    for found in rounds:
        check(model, found)


def test_processes_and_replicas(model: dict[str, Any]) -> None:
    """A7 and A8."""
    with Cluster(**(SETTINGS | model), data_parallel_size=2) as cluster:
        check(model, cluster.generate(REQUESTS))


def test_scoring(model: dict[str, Any]) -> None:
    """A15: log-probabilities of prompt and output are those given while generating."""
    place = next(i for i, r in enumerate(REQUESTS) if len(r.prompt_token_ids) == 300)
    lone, request = alone(model["model"], "invariant")[place], REQUESTS[place]
    whole = [*request.prompt_token_ids, *lone.token_ids]
    params = msgspec.structs.replace(request.params, max_tokens=1, prompt_logprobs=0)
    again = msgspec.structs.replace(request, request_id="again", prompt_token_ids=whole, params=params)
    client = launch_inproc(**model, enable_prefix_caching=False)
    try:
        [scored] = generate(client, [again])
    finally:
        client.close()
    count = len(lone.token_ids)
    assert [p.bits[0] for p in scored.prompt_logprobs[-count:]] == [p.bits[0] for p in lone.logprobs]
