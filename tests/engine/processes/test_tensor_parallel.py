"""Workers that share a model: the bits of one worker with the same profile, and a named error where ranks differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from moments import in_a_moment
from workload import KV_BLOCK_BYTES, SETTINGS, check_alone, make_requests, run_alone

from sempre.engine.harness import Cluster, compare_generations
from sempre.ipc.errors import SeedMismatch, StartupError, WorkerDied
from sempre.ipc.messages import RequestSpec

Start = Callable[..., Cluster]
Requests = Callable[..., list[RequestSpec]]

TWO: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key != "model"} | {"tensor_parallel_size": 2}


check = partial(check_alone, profile="tree8")


@pytest.fixture
def two_ranks(start: Start) -> Callable[..., Cluster]:
    return lambda **settings: start("sempre.workers", **(TWO | settings))


def test_two_ranks_with_chunks_preemption_and_a_prefix_cache(two_ranks: Start) -> None:
    """Each rank keeps half of the heads, so that half of the bytes hold as many blocks."""
    cluster = two_ranks(max_num_batched_tokens=50, kv_cache_memory_bytes=17 * KV_BLOCK_BYTES, max_num_seqs=12)
    assert cluster.ready.world_size == 2
    assert cluster.ready.num_blocks == 34
    assert cluster.ready.fingerprint["numerics_profile"] == "tree8"
    first, second = cluster.rng_digests()
    assert first == second
    check(cluster.generate(make_requests()))
    check(cluster.generate(make_requests()[::-1])[::-1])
    metrics = cluster.metrics()
    assert metrics["num_preemptions"] > [0.0]
    assert metrics["prefix_cache_hits"] > [0.0]
    assert not compare_generations(run_alone("invariant"), run_alone("invariant", "tree8")).equal
    # nothing of a cluster stays in memory: the workers' file has no name
    assert cluster.call("self_test")[0] == cluster.call("self_test")[1]


@pytest.mark.parametrize(
    "speculation",
    [
        {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3},
        pytest.param({"method": "ngram", "num_speculative_tokens": 4}, marks=pytest.mark.product),
        pytest.param(
            {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3, "placement": "worker"},
            marks=pytest.mark.product,
        ),
    ],
    ids=["draft model on all ranks", "ngram", "draft worker"],
)
def test_speculation(speculation: dict[str, object], two_ranks: Start) -> None:
    cluster = two_ranks(speculative_config={**speculation, "adaptive": False})
    check(cluster.generate(make_requests()))
    assert cluster.metrics()["spec_decode_num_accepted_tokens"] > [0.0]


@pytest.mark.product
def test_replicas_of_two_ranks(two_ranks: Start) -> None:
    cluster = two_ranks(data_parallel_size=2)
    check(cluster.generate(make_requests()))
    assert len({tuple(sorted(digests.items())) for digests in cluster.rng_digests()}) == 1


@pytest.mark.parametrize(
    "target", [1, pytest.param(0, marks=pytest.mark.product)], ids=["rank 1 is killed", "rank 0 is killed"]
)
def test_a_rank_that_dies_in_the_middle(target: int, two_ranks: Start) -> None:
    cluster = two_ranks()
    former = cluster.worker_pids()
    digests = cluster.rng_digests()
    with in_a_moment(lambda: cluster.kill(target)):
        check(cluster.generate(make_requests()))
    check(cluster.generate(make_requests()))
    assert not set(former) & set(_pids(cluster))
    assert cluster.rng_digests() == digests


@pytest.mark.product
def test_a_rank_that_stalls_in_the_middle(two_ranks: Start) -> None:
    cluster = two_ranks(heartbeat_timeout_s=2.0)
    with in_a_moment(lambda: cluster.stop(0)):
        check(cluster.generate(make_requests()))


def _pids(cluster: Cluster) -> list[int]:
    return [worker.pid for worker in cluster.ranks()]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "another weight bit in the file",
            StartupError,
            r"rank 1 differs from rank 0 in fingerprint",
        ),
        ("a dropped partial", WorkerDied, r"rank 1 differs from rank 0 in step \d+, request '0', hidden state"),
        pytest.param(
            "another bit of the last norm in memory",
            WorkerDied,
            r"rank 1 differs from rank 0 in step \d+, request '0', hidden state",
            marks=pytest.mark.product,
        ),
    ],
)
def test_a_rank_that_computes_something_else(
    fault: str,
    error: type[Exception],
    message: str,
    start: Start,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEMPRE_TEST_FAULT", fault)
    with pytest.raises(error, match=message) as found:
        start("rank_workers", **TWO, max_restarts=0).generate(requests(2))
    assert found.value.rank == 1


# Ranks without a model


@pytest.mark.parametrize(("oddity", "when"), [("draws before load", "before"), ("draws at warm-up", "after warm-up")])
def test_ranks_that_are_seeded_differently(oddity: str, when: str, start_odd: Start) -> None:
    with pytest.raises(SeedMismatch, match=f"rank 1 is seeded differently from rank 0 {when}"):
        start_odd(oddity, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("oddity", "what"),
    [
        ("another token", r"request '3', tokens: expected \[\d+\], found \[9\]"),
        ("a result is left out", r"expected 4 results, found 3"),
    ],
)
def test_the_rank_the_step_and_the_request_are_named(
    oddity: str, what: str, start_odd: Start, requests: Requests
) -> None:
    with pytest.raises(WorkerDied, match=rf"rank 1 differs from rank 0 in step 3, {what}") as found:
        start_odd(oddity, tensor_parallel_size=2, max_restarts=0).generate(requests(4))
    assert found.value.rank == 1


def test_after_a_difference_the_requests_go_on_with_other_workers(start_odd: Start, requests: Requests) -> None:
    expected = start_odd("none", tensor_parallel_size=2).generate(requests(6))
    cluster = start_odd("another hidden state, once", tensor_parallel_size=2)
    former = cluster.worker_pids()
    assert cluster.generate(requests(6)) == expected
    assert not set(former) & set(_pids(cluster))


def test_results_of_several_steps_in_flight_are_matched_by_step(start: Start, requests: Requests) -> None:
    alone = start("ahead_worker").generate(requests(8))
    assert start("ahead_worker", tensor_parallel_size=4).generate(requests(8)) == alone
