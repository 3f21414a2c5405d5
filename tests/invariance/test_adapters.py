"""Axis A17, and the other axes with adapters: a request's bits depend on its own adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec
import pytest
from adapters import ALL, ATTENTION, adapter_spec, save_adapter, tiny_modules
from workload import KV_BLOCK_BYTES, SETTINGS, launch_inproc, make_requests, run_alone, run_inproc

from sempre.engine.harness import Cluster, Generation, compare_generations, generate, outcomes
from sempre.ipc.messages import AdapterSpec, GetMetrics, MetricsReply, RequestSpec

ADAPTERS: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16, "max_cpu_loras": 3}
# rank and modules of each
KINDS = [(4, ATTENTION), (16, ALL), (9, ("gate_proj", "up_proj", "down_proj"))]


@cache
def specs() -> list[AdapterSpec]:
    folder = Path(mkdtemp())
    return [
        adapter_spec(save_adapter(folder / f"{seed}", tiny_modules(modules), rank=rank, seed=seed))
        for seed, (rank, modules) in enumerate(KINDS)
    ]


def adapter_of(request: RequestSpec) -> AdapterSpec | None:
    """Three adapters, and the model itself for one request in four."""
    return [*specs(), None][request.ordinal % 4]


@pytest.fixture
def requests() -> list[RequestSpec]:
    return [msgspec.structs.replace(r, adapter=adapter_of(r)) for r in make_requests()]


@cache
def alone(numerics: str, profile: str = "single") -> list[Generation]:
    """Each request alone, in an engine that has served no other."""
    client = launch_inproc(numerics=numerics, numerics_profile=profile, enable_prefix_caching=False, **ADAPTERS)
    try:
        found = []
        for request in make_requests():
            found += generate(client, [msgspec.structs.replace(request, adapter=adapter_of(request))])
        return found
    finally:
        client.close()


@pytest.fixture
def check(numerics: str) -> Callable[[Sequence[Generation]], None]:
    """Assert that a run equals the lone runs, or, for the control, that it does not."""

    def compare(run: Sequence[Generation]) -> None:
        comparison = compare_generations(alone(numerics), run)
        assert comparison.equal == (numerics == "invariant"), comparison.first_difference

    return compare


def test_batch(requests: list[RequestSpec], numerics: str, check: Callable[..., None]) -> None:
    """A1, A17: all requests in one batch, where two of three adapters have room."""
    check(run_inproc(requests, numerics=numerics, **ADAPTERS))


def test_requests_without_adapters_are_those_of_an_engine_without(requests: list[RequestSpec]) -> None:
    found, plain = run_inproc(requests, **ADAPTERS), run_alone("invariant")
    places = [place for place, request in enumerate(requests) if request.adapter is None]
    others = [place for place in range(len(requests)) if place not in places]
    assert compare_generations([plain[place] for place in places], [found[place] for place in places]).equal
    assert all(not compare_generations([plain[place]], [found[place]]).equal for place in others)


def test_other_adapters_of_the_mates(requests: list[RequestSpec]) -> None:
    """A17: the mates have other adapters, or none, in other slots."""
    expected = alone("invariant")
    for shift in (1, 2):
        turned = [
            request
            if place % 4 == 0
            else msgspec.structs.replace(request, adapter=[*specs(), None][(place + shift) % 4])
            for place, request in enumerate(requests)
        ]
        found = run_inproc(turned, **{**ADAPTERS, "max_loras": 3})
        assert compare_generations(expected[::4], found[::4]).equal
        assert not compare_generations(expected, found).equal


def test_order(requests: list[RequestSpec], numerics: str, check: Callable[..., None]) -> None:
    """A2."""
    backwards = [msgspec.structs.replace(r, ordinal=len(requests) - r.ordinal) for r in reversed(requests)]
    check(run_inproc(backwards, numerics=numerics, max_num_seqs=5, **ADAPTERS)[::-1])


def test_chunking(requests: list[RequestSpec], numerics: str, check: Callable[..., None]) -> None:
    """A3."""
    check(run_inproc(requests, numerics=numerics, max_num_seqs=12, max_num_batched_tokens=33, **ADAPTERS))


def test_prefix_cache(requests: list[RequestSpec], numerics: str, check: Callable[..., None]) -> None:
    """A4: warm from the second round on; nothing is taken from another adapter."""
    client = launch_inproc(numerics=numerics, **ADAPTERS)
    try:
        for number in range(3):
            named = [msgspec.structs.replace(r, request_id=f"{number}-{r.request_id}") for r in requests]
            run = generate(client, named)
            check(run)
    finally:
        client.close()
    unscored = [request.params.first_scored_token is None for request in requests]
    whole = [(len(r.prompt_token_ids) - 1) // 16 * 16 * cached for r, cached in zip(requests, unscored, strict=True)]
    assert [each.num_cached_tokens for each in run] == whole


def test_preemption(requests: list[RequestSpec], numerics: str, check: Callable[..., None]) -> None:
    """A5."""
    client = launch_inproc(
        numerics=numerics, kv_cache_memory_bytes=34 * KV_BLOCK_BYTES, max_num_seqs=12, **{**ADAPTERS, "max_loras": 3}
    )
    try:
        run = generate(client, requests)
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    assert reply.values["num_preemptions"] > [0.0], "nothing was preempted"
    check(run)


@pytest.fixture
def cluster(numerics: str) -> Iterator[Cluster]:
    """Two replicas, in processes of their own."""
    with Cluster(**SETTINGS, numerics=numerics, data_parallel_size=2, **ADAPTERS) as running:
        yield running


def test_processes_and_replicas(requests: list[RequestSpec], cluster: Cluster, check: Callable[..., None]) -> None:
    """A7, A8."""
    check(cluster.generate(requests))


SHARED = [
    {"pipeline_parallel_size": 2},
    pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.product),
    pytest.param({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, marks=pytest.mark.product),
    pytest.param(
        {"tensor_parallel_size": 2, "max_num_batched_tokens": 33, "max_num_seqs": 7}, marks=pytest.mark.product
    ),
]


@pytest.mark.parametrize("layout", SHARED, ids=lambda each: " ".join(f"{name}={each[name]}" for name in each))
def test_ranks_and_stages(layout: dict[str, int], requests: list[RequestSpec]) -> None:
    """A10; one of the requests names files that have gone, which fails it alone."""
    profile = "tree8" if "tensor_parallel_size" in layout else "single"
    expected = alone("invariant", profile)
    gone = msgspec.structs.replace(specs()[0], path="/nowhere", digest="0" * 64)
    lost = msgspec.structs.replace(requests[0], request_id="lost", adapter=gone)
    with Cluster(**{**SETTINGS, **ADAPTERS, **layout}) as cluster:
        *found, failed = outcomes(cluster.client, [*requests, lost])
    run = [outcome.result() for outcome in found]
    comparison = compare_generations(expected, run)
    assert comparison.equal, comparison.first_difference
    assert "/nowhere" in str(failed.error)
    if profile == "tree8":
        assert not compare_generations(alone("invariant"), run).equal


SPECULATIVE = [{"method": "ngram", "prompt_lookup_min": 1}, {"method": "draft_model", "model": "tiny-draft"}]


@pytest.mark.parametrize("speculative", SPECULATIVE, ids=lambda each: str(each["method"]))
def test_speculation(speculative: dict[str, Any], requests: list[RequestSpec]) -> None:
    """A9: drafts come without adapters, and change nothing."""
    client = launch_inproc(speculative_config={**speculative, "adaptive": False}, **ADAPTERS)
    try:
        found = generate(client, requests)
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    assert reply.values["spec_decode_num_accepted_tokens"] > [0.0]
    assert compare_generations(alone("invariant"), found).equal


def test_a_killed_worker_loads_them_again(requests: list[RequestSpec]) -> None:
    """A11: its successor knows no adapter, and continues with equal bits."""
    with Cluster(**SETTINGS, **ADAPTERS) as cluster:
        assert compare_generations(alone("invariant"), cluster.generate(requests)).equal
        cluster.kill(0)
        renamed = [msgspec.structs.replace(r, request_id=f"again-{r.request_id}") for r in requests]
        assert compare_generations(alone("invariant"), cluster.generate(renamed)).equal
