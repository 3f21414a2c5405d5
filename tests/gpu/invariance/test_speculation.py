"""Axis A9 on a GPU: whatever is drafted, tokens and log-probability bits are the same as without speculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from drafters import drafting_with
from gpu_workload import KV_BLOCK_BYTES, launch_inproc, make_requests, model_folder, run_alone, run_inproc

from sempre.engine import LLM, Counter, SamplingParams
from sempre.engine.harness import Generation, compare_generations, generate, make_request
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.messages import GetMetrics, MetricsReply, RequestSpec

pytestmark = pytest.mark.gpu

SHARES_RIGHT = {"random": 0.0, "half": 0.5, "oracle": 1.0}
ROOMS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "eager": {"enforce_eager": True},
    "chunked": {"max_num_batched_tokens": 64},
    "preempted": {"kv_cache_memory_bytes": 520 * KV_BLOCK_BYTES, "max_model_len": 4096},
}


@pytest.fixture
def requests() -> list[RequestSpec]:
    return make_requests()


def check(run: Sequence[Generation]) -> None:
    comparison = compare_generations(run_alone(len(run)), run)
    assert comparison.equal, comparison.first_difference


def sequences(requests: Sequence[RequestSpec]) -> list[list[int]]:
    return [[*r.prompt_token_ids, *g.token_ids] for r, g in zip(requests, run_alone(len(requests)), strict=True)]


def ngram(size: int) -> SpeculativeConfig:
    return SpeculativeConfig(method="ngram", num_speculative_tokens=size, adaptive=False)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("drafter", SHARES_RIGHT)
def test_scripted_drafters(requests: list[RequestSpec], drafter: str, size: int, room: str) -> None:
    with drafting_with(sequences(requests), SHARES_RIGHT[drafter]):
        client = launch_inproc(speculative_config=ngram(size), **ROOMS[room])
        try:
            check(generate(client, requests))
            alone = [generate(client, [request])[0] for request in requests[:6]]
            assert compare_generations(run_alone(len(requests))[:6], alone).equal
            client.send(GetMetrics(call_id=1))
            reply = client.receive()
        finally:
            client.close()
    assert isinstance(reply, MetricsReply)
    (drafted,) = reply.values["spec_decode_num_draft_tokens"]
    (accepted,) = reply.values["spec_decode_num_accepted_tokens"]
    assert drafted > 0
    assert (accepted > 0) == (drafter != "random")
    assert (accepted == drafted) == (drafter == "oracle")


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_lookup(requests: list[RequestSpec], method: str) -> None:
    check(run_inproc(requests, speculative_config={"method": method, "prompt_lookup_min": 1}))


@pytest.mark.parametrize("placement", ["colocated", "worker"])
def test_draft_model(requests: list[RequestSpec], placement: str) -> None:
    """The model as its own draft model: its drafts are right, computed by other kernels."""
    config = {"method": "draft_model", "model": model_folder(), "placement": placement, "adaptive": False}
    settings = {"kv_cache_memory_bytes": 3000 * KV_BLOCK_BYTES * (2 if placement == "colocated" else 1)}
    client = launch_inproc(speculative_config=config, **settings)
    try:
        check(generate(client, requests))
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    (drafted,) = reply.values["spec_decode_num_draft_tokens"]
    (accepted,) = reply.values["spec_decode_num_accepted_tokens"]
    assert accepted == drafted > 0


def test_many_requests_of_every_kind() -> None:
    """More drafts than one step takes, with and without histories to count."""
    kinds: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.2}, {"top_p": 0.9}, {"bad_words_token_ids": [[5, 6]]}]
    requests = [
        make_request(
            [7 + i, 8, 9, 7 + i, 8], seed=i, ordinal=i, max_tokens=20, temperature=1.0, logprobs=2, **kinds[i % 4]
        )
        for i in range(128)
    ]
    expected = run_inproc(requests)
    whole = [[*r.prompt_token_ids, *g.token_ids] for r, g in zip(requests, expected, strict=True)]
    with drafting_with(whole, 0.7):
        comparison = compare_generations(expected, run_inproc(requests, speculative_config=ngram(4)))
    assert comparison.equal, comparison.first_difference


def test_the_control_notices(requests: list[RequestSpec]) -> None:
    """With a matmul whose bits depend on the number of rows, speculation changes the output."""
    lone = [run_inproc([r], numerics="control", enforce_eager=True)[0] for r in requests[:8]]
    whole = [[*r.prompt_token_ids, *g.token_ids] for r, g in zip(requests, lone, strict=False)]
    with drafting_with(whole, 1.0):
        found = run_inproc(requests[:8], numerics="control", speculative_config=ngram(7))
    assert not compare_generations(lone, found).equal


def test_tiny_pair_on_a_gpu() -> None:
    """Trained weights: most drafts are accepted, and the text is the same as without speculation."""
    params = [SamplingParams(temperature=t, seed=1, max_tokens=64, logprobs=2) for t in (0.0, 0.7, 1.0)]
    prompts = ["It is a truth universally acknowledged"] * len(params)
    outputs = []
    drafting = {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 4, "adaptive": False}
    for config in (None, drafting):
        with LLM("tiny", device="cuda", multiprocessing=False, max_model_len=512, speculative_config=config) as llm:
            results = llm.generate(prompts, params, use_tqdm=False)
            outputs.append([(r.outputs[0].token_ids, r.outputs[0].logprobs) for r in results])
            metrics = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    assert outputs[0] == outputs[1]
    drafts, accepted = (metrics[f"sempre:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    assert 1 + accepted / drafts >= 2.0


def test_requests_that_come_and_go_while_others_verify(requests: list[RequestSpec]) -> None:
    """Arrivals in the middle: prompts, plain decoding and verification in one step."""
    late = [msgspec.structs.replace(r, ordinal=100 + r.ordinal) for r in requests]
    with drafting_with(sequences(requests), 0.5):
        check(run_inproc(late, speculative_config=ngram(4), max_num_seqs=5))
