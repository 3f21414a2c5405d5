"""Workers that each have some of a model's layers: the bits of one worker, and a named error where stages differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from workload import KV_BLOCK_BYTES, SETTINGS, make_requests, run_alone

from sempre.engine.harness import Cluster, Generation, compare_generations
from sempre.ipc.messages import RequestSpec

Start = Callable[..., Cluster]
Requests = Callable[..., list[RequestSpec]]

TWO: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key != "model"} | {"pipeline_parallel_size": 2}


def check(run: Sequence[Generation], profile: str = "single") -> None:
    comparison = compare_generations(run_alone("invariant", profile), run)
    assert comparison.equal, comparison.first_difference


@pytest.fixture
def two_stages(start: Start) -> Callable[..., Cluster]:
    return lambda **settings: start("sempre.workers", **(TWO | settings))


def test_two_stages_with_chunks_preemption_and_a_prefix_cache(two_stages: Start) -> None:
    """Each stage keeps half of the layers, so that half of the bytes hold as many blocks."""
    cluster = two_stages(max_num_batched_tokens=50, kv_cache_memory_bytes=17 * KV_BLOCK_BYTES, max_num_seqs=12)
    assert cluster.ready.world_size == 2
    assert cluster.ready.num_blocks == 34
    assert cluster.ready.fingerprint["numerics_profile"] == "single"
    first, second = cluster.rng_digests()
    assert first == second
    check(cluster.generate(make_requests()))
    check(cluster.generate(make_requests()[::-1])[::-1])
    metrics = cluster.metrics()
    assert metrics["num_preemptions"] > [0.0]
    assert metrics["prefix_cache_hits"] > [0.0]
    assert not compare_generations(run_alone("invariant", "tree8"), run_alone("invariant")).equal
    assert all(passed["model"] for passed in cluster.call("self_test"))
