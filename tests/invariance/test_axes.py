"""Axes A1–A5, A7, A8 and A11: a request's result does not depend on what the engine does around it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import msgspec
import pytest
from workload import KV_BLOCK_BYTES, SETTINGS, launch_inproc, run_inproc

from sempre.engine.harness import Cluster, Generation, compare_generations, generate
from sempre.ipc.messages import GetMetrics, MetricsReply, RequestSpec

Check = Callable[[Sequence[Generation]], None]


def values_and_one_control(name: str, values: Sequence[int]) -> pytest.MarkDecorator:
    """Every value with the invariant matmul, and the first one with the control."""
    return pytest.mark.parametrize(
        (name, "numerics"),
        [(value, "invariant") for value in values]
        + [pytest.param(v, "control", marks=[pytest.mark.product] if i else []) for i, v in enumerate(values)],
    )


def test_batch(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """A1: all requests in one batch."""
    check(run_inproc(requests, numerics=numerics))


@values_and_one_control("max_num_seqs", [3, 7])
def test_batch_size(requests: list[RequestSpec], numerics: str, check: Check, max_num_seqs: int) -> None:
    """A1: batches that fill and drain."""
    check(run_inproc(requests, numerics=numerics, max_num_seqs=max_num_seqs))


def test_order(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """A2: the reverse order of arrival."""
    backwards = [msgspec.structs.replace(r, ordinal=len(requests) - r.ordinal) for r in reversed(requests)]
    check(run_inproc(backwards, numerics=numerics, max_num_seqs=5)[::-1])


@values_and_one_control("max_num_batched_tokens", [33, 16, 64])
def test_chunking(requests: list[RequestSpec], numerics: str, check: Check, max_num_batched_tokens: int) -> None:
    """A3: prompts cut at even and odd places, beside decoding requests."""
    check(run_inproc(requests, numerics=numerics, max_num_seqs=12, max_num_batched_tokens=max_num_batched_tokens))


def test_prefix_cache(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """A4: cold, then warm, then partly evicted by the other requests."""
    # fewer blocks than the requests fill together, so some prefixes are gone when their request returns
    client = launch_inproc(numerics=numerics, kv_cache_memory_bytes=64 * KV_BLOCK_BYTES)
    try:
        rounds = [generate(client, [_named(r, f"{n}-{r.request_id}") for r in requests]) for n in range(3)]
    finally:
        client.close()
    for run in rounds:
        check(run)
    cached = [run_of.num_cached_tokens for run_of in rounds[2]]
    whole = [(len(r.prompt_token_ids) - 1) // 16 * 16 for r in requests if r.params.first_scored_token is None]
    assert 0 < sum(cached) < sum(whole), "the cache should be warm, and partly evicted"


def test_preemption(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """A5: too few blocks for all, so running requests are evicted and recomputed."""
    client = launch_inproc(numerics=numerics, kv_cache_memory_bytes=34 * KV_BLOCK_BYTES, max_num_seqs=12)
    try:
        run = generate(client, requests)
        client.send(GetMetrics(call_id=1))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, MetricsReply)
    assert reply.values["num_preemptions"] > [0.0], "nothing was preempted"
    check(run)


def test_processes(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """A7: coordinator and worker in processes of their own."""
    with Cluster(**SETTINGS, numerics=numerics) as cluster:
        check(cluster.generate(requests))


def test_replicas(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """A8: two replicas, and therefore other batches; which one served a request does not matter either."""
    with Cluster(**SETTINGS, numerics=numerics, data_parallel_size=2) as cluster:
        check(cluster.generate(requests))


@cache
def run_in_a_new_process() -> dict[str, list[Generation]]:
    """In another interpreter, with another hash seed; by numerics."""
    program = (
        "import sys, msgspec; from workload import make_requests, run_inproc\n"
        "results = {name: run_inproc(make_requests(), numerics=name) for name in ('invariant', 'control')}\n"
        "sys.stdout.buffer.write(msgspec.msgpack.encode(results))"
    )
    support = str(Path(__file__).parents[1] / "support")
    folders = [support, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.msgpack.decode(done.stdout, type=dict[str, list[Generation]])


def test_new_process(numerics: str, check: Check) -> None:
    """A11."""
    check(run_in_a_new_process()[numerics])


def test_threads(requests: list[RequestSpec], numerics: str, check: Check) -> None:
    """The number of compute threads of a worker does not matter either."""
    threads = min(2, os.cpu_count() or 1)
    check(run_inproc(requests, numerics=numerics, num_threads=threads))


def test_another_seed_is_noticed(requests: list[RequestSpec]) -> None:
    """The comparison notices a difference in one request's seed, and names that request."""
    changed = list(requests)
    changed[3] = msgspec.structs.replace(changed[3], seed=changed[3].seed + 1)
    comparison = compare_generations(run_inproc(requests), run_inproc(changed))
    assert not comparison.equal
    assert comparison.first_difference is not None
    assert comparison.first_difference.startswith("request 3 ")


def _named(request: RequestSpec, request_id: str) -> RequestSpec:
    return msgspec.structs.replace(request, request_id=request_id)
