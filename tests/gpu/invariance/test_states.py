"""A4, A5 and A9 of a model whose layers keep states, on a GPU: with few blocks and slots, drafts of every quality, as
graphs and kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import pytest
from drafters import drafting_with
from gpu_workload import launch_inproc, make_requests, model_folder

from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Generation, compare_generations, generate
from sempre.ipc.messages import GetMetrics, MetricsReply

pytestmark = pytest.mark.gpu

FAMILY = "qwen3.5"
# 24 requests have their own slots, and about 130 blocks of 64 tokens are left: less than the requests fill together
CROWDED: dict[str, Any] = {"max_num_seqs": 24, "kv_cache_memory_bytes": 31 << 20}


def launch(**settings: Any) -> InprocClient:
    return launch_inproc(model=model_folder(FAMILY), **({"kv_cache_memory_bytes": 1 << 30} | settings))


@cache
def alone() -> tuple[Generation, ...]:
    client = launch(enforce_eager=True, enable_prefix_caching=False)
    try:
        return tuple(generate(client, [request])[0] for request in make_requests())
    finally:
        client.close()


def check(run: Sequence[Generation]) -> None:
    comparison = compare_generations(alone(), run)
    assert comparison.equal, comparison.first_difference


def metrics(client: InprocClient) -> dict[str, Any]:
    client.send(GetMetrics(call_id=1))
    reply = client.receive()
    assert isinstance(reply, MetricsReply)
    return reply.values


def test_prefix_cache_and_preemption() -> None:
    """Cold, warm, and partly evicted."""
    client = launch(**CROWDED)
    try:
        for n in range(3):
            named = [msgspec.structs.replace(r, request_id=f"{n}-{r.request_id}") for r in make_requests()]
            check(generate(client, named))
        assert metrics(client)["prefix_cache_hits"] > [0.0]
    finally:
        client.close()


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, CROWDED], ids=str)
@pytest.mark.parametrize("share_right", [0.0, 0.5, 1.0])
def test_drafts(share_right: float, settings: dict[str, Any]) -> None:
    requests = make_requests()
    sequences = [[*request.prompt_token_ids, *one.token_ids] for request, one in zip(requests, alone(), strict=True)]
    config = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    with drafting_with(sequences, share_right):
        client = launch(speculative_config=config, **settings)
        try:
            check(generate(client, requests))
            counted = metrics(client)
        finally:
            client.close()
    assert counted["spec_decode_num_draft_tokens"] > [0.0]
    assert (counted["spec_decode_num_accepted_tokens"][0] > 0) == (share_right > 0)
