"""Axes A1–A5 for models whose matrices are fp8, quantised while loading or stored so, or whose KV cache is; each with a
control that must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from fp8_checkpoints import write_tiny
from workload import FP8_KV_BLOCK_BYTES, KV_BLOCK_BYTES, launch_inproc, make_requests

from sempre.engine.harness import Generation, compare_generations, generate
from sempre.ipc.messages import GetMetrics, MetricsReply, RequestSpec

Run = Callable[..., list[Generation]]


STORED = "compressed-tensors fp8"
KV_CACHE = "kv_cache_dtype fp8"
# every storage with the invariant matmul; the control is the same for all, so one always runs
VARIANTS = [
    pytest.param((storage, numerics), marks=[] if always else [pytest.mark.product], id=f"{storage}-{numerics}")
    for storage, numerics, always in (
        ("fp8", "invariant", True),
        ("fp8", "control", True),
        ("fp8_weight_only", "invariant", False),
        ("fp8_weight_only", "control", False),
        (STORED, "invariant", True),
        (STORED, "control", False),
        (KV_CACHE, "invariant", False),
        (KV_CACHE, "control", False),
    )
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """What is fp8, and which matmul runs."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="module")
def model(variant: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The engine's settings."""
    if variant[0] == KV_CACHE:
        return {"kv_cache_dtype": "fp8"}
    if variant[0] != STORED:
        return {"quantization": variant[0]}
    return {"model": str(write_tiny(tmp_path_factory.mktemp("tiny-fp8"), "fp8", "tensor"))}


@pytest.fixture(scope="module")
def numerics(variant: tuple[str, str]) -> str:
    return variant[1]


@pytest.fixture(scope="module")
def requests() -> list[RequestSpec]:
    return make_requests()[1::2]


@pytest.fixture(scope="module")
def run(model: dict[str, Any], numerics: str) -> Run:
    """(requests, rounds, settings) → the results, one round after the other."""

    def start(
        requests: list[RequestSpec], rounds: int = 1, expect_preemption: bool = False, **settings: Any
    ) -> list[Generation]:
        client = launch_inproc(**model, numerics=numerics, **settings)
        try:
            results: list[Generation] = []
            for number in range(rounds):
                again = [msgspec.structs.replace(r, request_id=f"{number}-{r.request_id}") for r in requests]
                results += generate(client, again)
            client.send(GetMetrics(call_id=1))
            reply = client.receive()
            assert isinstance(reply, MetricsReply)
            assert (reply.values["num_preemptions"] > [0.0]) is expect_preemption
            return results
        finally:
            client.close()

    return start


@pytest.fixture(scope="module")
def alone(model: dict[str, Any], numerics: str, requests: list[RequestSpec]) -> Iterator[list[Generation]]:
    client = launch_inproc(**model, numerics=numerics, enable_prefix_caching=False)
    try:
        yield [generate(client, [request])[0] for request in requests]
    finally:
        client.close()


@pytest.fixture
def check(numerics: str, alone: list[Generation]) -> Callable[[list[Generation]], None]:
    def compare(results: list[Generation]) -> None:
        for start in range(0, len(results), len(alone)):
            comparison = compare_generations(alone, results[start : start + len(alone)])
            if numerics == "invariant":
                assert comparison.equal, comparison.first_difference
            else:
                assert not comparison.equal, "the control gave equal bits: this test could not notice a difference"

    return compare


def test_batch(run: Run, requests: list[RequestSpec], check: Any) -> None:
    """A1."""
    check(run(requests))


def test_order(run: Run, requests: list[RequestSpec], check: Any) -> None:
    """A2: the reverse order of arrival, in batches that fill and drain."""
    backwards = [msgspec.structs.replace(r, ordinal=len(requests) - r.ordinal) for r in reversed(requests)]
    check(run(backwards, max_num_seqs=3)[::-1])


def test_chunking(run: Run, requests: list[RequestSpec], check: Any) -> None:
    """A3."""
    check(run(requests, max_num_seqs=12, max_num_batched_tokens=33))


def test_prefix_cache(run: Run, requests: list[RequestSpec], check: Any) -> None:
    """A4: cold, then warm."""
    results = run(requests, rounds=2)
    check(results)
    assert sum(result.num_cached_tokens for result in results[len(requests) :]) > 0


def test_preemption(run: Run, requests: list[RequestSpec], check: Any, variant: tuple[str, str]) -> None:
    """A5: too few blocks for all, so running requests are evicted and recomputed."""
    block_bytes = FP8_KV_BLOCK_BYTES if variant[0] == KV_CACHE else KV_BLOCK_BYTES
    few = {"max_model_len": 336, "kv_cache_memory_bytes": 25 * block_bytes}
    check(run(requests, expect_preemption=True, max_num_seqs=12, **few))


def test_speculation(run: Run, requests: list[RequestSpec], check: Any) -> None:
    """A9: a draft model, whose cache is of the same dtype, and prompts cut into chunks."""
    drafts = {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3}
    check(run(requests, speculative_config=drafts, max_num_batched_tokens=65))
