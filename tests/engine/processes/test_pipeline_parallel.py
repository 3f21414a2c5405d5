"""Workers that each have some of a model's layers: the bits of one worker, and a named error where stages differ."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_checkpoint import hybrid_settings, write_hybrid_checkpoint
from workload import KV_BLOCK_BYTES, SETTINGS, check_alone, make_requests, run_alone, run_inproc

from sempre.engine.harness import Cluster, compare_generations, make_request
from sempre.ipc.errors import ConfigError, RequestError, SeedMismatch, StartupError, WorkerDied
from sempre.ipc.messages import AddRequests, RequestSpec

Start = Callable[..., Cluster]
Requests = Callable[..., list[RequestSpec]]

TWO: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key != "model"} | {"pipeline_parallel_size": 2}


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
    check_alone(cluster.generate(make_requests()))
    check_alone(cluster.generate(make_requests()[::-1])[::-1])
    metrics = cluster.metrics()
    assert metrics["num_preemptions"] > [0.0]
    assert metrics["prefix_cache_hits"] > [0.0]
    assert not compare_generations(run_alone("invariant", "tree8"), run_alone("invariant")).equal
    assert all(passed["model"] for passed in cluster.call("self_test"))


@pytest.mark.product
@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel_size": 2},
        pytest.param({"pipeline_parallel_size": 4}, marks=pytest.mark.product),
        pytest.param({"data_parallel_size": 2}, marks=pytest.mark.product),
    ],
    ids=["two stages of two ranks", "four stages, two layers or one", "two replicas"],
)
def test_other_layouts(settings: dict[str, int], two_stages: Start) -> None:
    cluster = two_stages(**settings)
    check_alone(cluster.generate(make_requests()), "tree8" if "tensor_parallel_size" in settings else "single")
    assert len({tuple(sorted(digests.items())) for digests in cluster.rng_digests()}) == 1


@pytest.mark.parametrize("num_stages", [2, pytest.param(4, marks=pytest.mark.product)])
def test_layers_that_keep_states(num_stages: int, tmp_path: Path) -> None:
    """The first of two stages, and three of four, have no layer with keys and values."""
    settings = hybrid_settings(write_hybrid_checkpoint(tmp_path))
    expected = run_inproc(make_requests(), **settings)
    with Cluster(**settings, pipeline_parallel_size=num_stages, max_num_seqs=6, max_num_batched_tokens=60) as cluster:
        comparison = compare_generations(expected, cluster.generate(make_requests()))
        assert comparison.equal, comparison.first_difference
        assert cluster.metrics()["prefix_cache_hits"] > [0.0]


@pytest.mark.parametrize(
    "speculation",
    [
        {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3},
        pytest.param({"method": "ngram", "num_speculative_tokens": 4}, marks=pytest.mark.product),
        pytest.param({"method": "suffix", "num_speculative_tokens": 4}, marks=pytest.mark.product),
        pytest.param(
            {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3, "placement": "worker"},
            marks=pytest.mark.product,
        ),
    ],
    ids=["draft model of the last stage", "ngram", "suffix", "draft worker"],
)
def test_speculation(speculation: dict[str, object], two_stages: Start) -> None:
    cluster = two_stages(speculative_config={**speculation, "adaptive": False})
    check_alone(cluster.generate(make_requests()))
    assert cluster.metrics()["spec_decode_num_accepted_tokens"] > [0.0]


@pytest.mark.product
@pytest.mark.parametrize(
    "target", [1, pytest.param(0, marks=pytest.mark.product)], ids=["the last stage", "the first stage"]
)
def test_a_stage_that_dies_in_the_middle(target: int, two_stages: Start) -> None:
    cluster = two_stages()
    former, digests = cluster.worker_pids(), cluster.rng_digests()
    killer = threading.Thread(target=lambda: (time.sleep(0.4), cluster.kill(target)))
    killer.start()
    check_alone(cluster.generate(make_requests()))
    killer.join()
    check_alone(cluster.generate(make_requests()))
    assert not set(former) & set(cluster.worker_pids())
    assert cluster.rng_digests() == digests


@pytest.mark.product
def test_a_request_that_fails_harms_no_other(two_stages: Start) -> None:
    """The last stage finds that its form cannot be read; the first goes on with the others."""
    cluster = two_stages()
    bad = make_request([5, 6, 7], ordinal=99, request_id="bad", max_tokens=8, grammar="no grammar at all")
    cluster.client.send(AddRequests(requests=[bad]))
    check_alone(cluster.generate(make_requests()))
    with pytest.raises(RequestError, match="structured_outputs: "):
        cluster.generate([bad])


@pytest.mark.product
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 7}, r"pipeline_parallel_size: stage \d: expected at most the model's 6 layers"),
        ({"enable_lora": True}, r"enable_lora: expected pipeline_parallel_size 1, found 2"),
        (
            {"runner": "pooling", "pooler_config": {"pooling_type": "MEAN"}},
            r"pipeline_parallel_size: stage \d: expected one stage for a model that pools, found 2",
        ),
    ],
)
def test_what_stages_cannot_share_is_refused(settings: dict[str, object], message: str, two_stages: Start) -> None:
    with pytest.raises(ConfigError, match=message):
        two_stages(**settings)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("another weight bit in the file", StartupError, r"rank 1 differs from rank 0 in fingerprint"),
        (
            "another hidden state is received",
            WorkerDied,
            r"rank 1 differs from rank 0 in step \d+, request '0', hidden state from the stage before",
        ),
    ],
)
def test_a_stage_that_computes_something_else(
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
def test_stages_that_are_seeded_differently(oddity: str, when: str, start_odd: Start) -> None:
    with pytest.raises(SeedMismatch, match=f"rank 1 is seeded differently from rank 0 {when}"):
        start_odd(oddity, pipeline_parallel_size=2)


def test_blocks_of_stages_may_have_other_sizes(start_odd: Start, requests: Requests) -> None:
    expected = start_odd("none").generate(requests(3))
    assert start_odd("other block size", pipeline_parallel_size=2).generate(requests(3)) == expected


@pytest.mark.parametrize(
    ("oddity", "what"),
    [
        ("another token", r"request '3', tokens: expected \[\d+\], found \[9\]"),
        ("a result is left out", r"expected 4 results, found 3"),
    ],
)
def test_the_stage_the_step_and_the_request_are_named(
    oddity: str, what: str, start_odd: Start, requests: Requests
) -> None:
    with pytest.raises(WorkerDied, match=rf"rank 1 differs from rank 0 in step 3, {what}") as found:
        start_odd(oddity, pipeline_parallel_size=2, max_restarts=0).generate(requests(4))
    assert found.value.rank == 1
