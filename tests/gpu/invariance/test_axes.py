"""Axes A1–A7, A11, A14 and A15 on a GPU: a request's result does not depend on what the engine does around it.

Every run is compared with the requests run alone, kernel by kernel, in tokens and in every log-probability bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pytest
from gpu_workload import (
    KV_BLOCK_BYTES,
    OUTPUT_TOKENS,
    SETTINGS,
    launch_inproc,
    make_requests,
    model_folder,
    prompt,
    run_alone,
    run_inproc,
)

from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Cluster, Generation, compare_generations, generate, make_request
from sempre.ipc.messages import GetMetrics, MetricsReply, RequestSpec

pytestmark = pytest.mark.gpu


def check(run: Sequence[Generation], count: int = 24) -> None:
    comparison = compare_generations(run_alone(count), run)
    assert comparison.equal, comparison.first_difference


@pytest.fixture
def requests() -> list[RequestSpec]:
    return make_requests()


@pytest.fixture(scope="module")
def engine() -> Iterator[InprocClient]:
    """One engine for the tests that need no other settings; nothing is cached between them."""
    client = launch_inproc(enable_prefix_caching=False)
    yield client
    client.close()


def test_batch(engine: InprocClient, requests: list[RequestSpec]) -> None:
    """A1: all requests in one batch."""
    check(generate(engine, requests))


@pytest.mark.parametrize("max_num_seqs", [1, 3, 7])
def test_small_batches(requests: list[RequestSpec], max_num_seqs: int) -> None:
    """A1: batches that fill and drain."""
    check(run_inproc(requests, max_num_seqs=max_num_seqs))


@pytest.fixture(scope="module")
def wanted_alone() -> Generation:
    return run_inproc([_wanted()], enforce_eager=True, enable_prefix_caching=False)[0]


def _wanted() -> RequestSpec:
    return make_request(prompt(77, 40), seed=7, ordinal=0, max_tokens=6, logprobs=4, temperature=1.0)


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 16, 17, 31, 33, 64, 100, 129, 200, 256])
def test_every_size_of_batch(engine: InprocClient, wanted_alone: Generation, batch: int) -> None:
    """A1 and A6: one request among others, in batches of 1 to 256 and in the buckets they are padded to."""
    wanted = _wanted()
    others = [
        make_request(prompt(100 + i, 1 + 13 * i % 90), seed=i, ordinal=i, max_tokens=5 + i % 3, temperature=1.0)
        for i in range(1, batch)
    ]
    comparison = compare_generations([wanted_alone], generate(engine, [wanted, *others])[:1])
    assert comparison.equal, comparison.first_difference


def test_order(requests: list[RequestSpec]) -> None:
    """A2: the reverse order of arrival."""
    backwards = [msgspec.structs.replace(r, ordinal=len(requests) - r.ordinal) for r in reversed(requests)]
    check(run_inproc(backwards, max_num_seqs=5)[::-1])


@pytest.mark.parametrize("max_num_batched_tokens", [33, 64, 257, 1000])
def test_chunking(requests: list[RequestSpec], max_num_batched_tokens: int) -> None:
    """A3: prompts cut at even and odd places, beside decoding requests."""
    check(run_inproc(requests, max_num_seqs=24, max_num_batched_tokens=max_num_batched_tokens))


def test_prefix_cache(requests: list[RequestSpec]) -> None:
    """A4: cold, then warm, then partly evicted by the other requests."""
    client = launch_inproc(kv_cache_memory_bytes=560 * KV_BLOCK_BYTES)
    try:
        rounds = [generate(client, [_named(r, f"{n}-{r.request_id}") for r in requests]) for n in range(3)]
    finally:
        client.close()
    for run in rounds:
        check(run)
    cached = sum(run_of.num_cached_tokens for run_of in rounds[2])
    whole = sum((len(r.prompt_token_ids) - 1) // 16 * 16 for r in requests if r.params.prompt_logprobs is None)
    assert 0 < cached < whole, "the cache should be warm, and partly evicted"


def test_preemption(requests: list[RequestSpec]) -> None:
    """A5: too few blocks for all, so running requests are evicted and recomputed."""
    short = [r for r in requests if len(r.prompt_token_ids) <= 600]
    settings = {"max_model_len": 1024, "max_num_seqs": 24}
    alone = [run_of for run_of, r in zip(run_alone(), requests, strict=True) if r in short]
    client = launch_inproc(kv_cache_memory_bytes=90 * KV_BLOCK_BYTES, **settings)
    try:
        run = generate(client, short)
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    assert reply.values["num_preemptions"] > [0.0], "nothing was preempted"
    comparison = compare_generations(alone, run)
    assert comparison.equal, comparison.first_difference


def test_graphs_off(requests: list[RequestSpec]) -> None:
    """A6: kernel by kernel."""
    check(run_inproc(requests, enforce_eager=True))


def test_processes(requests: list[RequestSpec]) -> None:
    """A7 and A11: coordinator and worker in processes of their own."""
    with Cluster(**(SETTINGS | {"model": model_folder()})) as cluster:
        check(cluster.generate(requests))
        check(cluster.generate([_named(r, f"2-{r.request_id}") for r in requests]))


def test_siblings(engine: InprocClient, requests: list[RequestSpec]) -> None:
    """A13 depends on the seed alone: the same prompt with two seeds in one batch equals the two alone."""
    pair = [msgspec.structs.replace(requests[1], request_id=f"s{i}", seed=50 + i, ordinal=i) for i in range(2)]
    lone = [generate(engine, [r])[0] for r in pair]
    comparison = compare_generations(lone, generate(engine, pair))
    assert comparison.equal, comparison.first_difference
    assert lone[0].token_ids != lone[1].token_ids


@pytest.mark.parametrize("logprobs", [None, 0, 20, 100, -1])
def test_reporting(engine: InprocClient, requests: list[RequestSpec], logprobs: int | None) -> None:
    """A14: reporting changes no token and no log-probability."""
    changed = [
        msgspec.structs.replace(r, params=msgspec.structs.replace(r.params, logprobs=logprobs)) for r in requests[:16]
    ]
    for lone, run in zip(run_alone(), generate(engine, changed), strict=False):
        assert lone.token_ids == run.token_ids
        if logprobs is not None:
            assert [p.bits[0] for p in lone.logprobs] == [p.bits[0] for p in run.logprobs]


def test_scoring(engine: InprocClient, requests: list[RequestSpec]) -> None:
    """A15: prompt log-probabilities of prompt and output equal those given while generating."""
    for request, lone in zip(requests, run_alone(), strict=True):
        if request.params.temperature != 1.0 or request.params.logprobs is None or lone.prompt_logprobs:
            continue
        whole = [*request.prompt_token_ids, *lone.token_ids]
        again = make_request(whole, max_tokens=1, prompt_logprobs=0, ordinal=900)
        scored = generate(engine, [again])[0].prompt_logprobs[-OUTPUT_TOKENS:]
        assert [p.bits[0] for p in scored] == [p.bits[0] for p in lone.logprobs]
        return
    raise AssertionError("no request to score")


def test_control() -> None:
    """The library's ordinary matmuls give other bits in a batch: these tests can fail."""
    requests = make_requests()
    batch = run_inproc(requests, numerics="control")
    assert not compare_generations(run_alone(numerics="control"), batch).equal


def test_another_seed_is_noticed(engine: InprocClient, requests: list[RequestSpec]) -> None:
    changed = list(requests)
    changed[3] = msgspec.structs.replace(changed[3], seed=changed[3].seed + 1)
    comparison = compare_generations(run_alone(), generate(engine, changed))
    assert not comparison.equal


def _named(request: RequestSpec, request_id: str) -> RequestSpec:
    return msgspec.structs.replace(request, request_id=request_id)
