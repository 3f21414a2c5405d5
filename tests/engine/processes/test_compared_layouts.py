"""Two settings or layouts are compared, and where they differ the first token and the first operation are named."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sempre.engine.harness import Comparison, compare_settings, make_request
from sempre.ipc.messages import RequestSpec

ALONE: dict[str, Any] = {"model": "tiny", "num_threads": 1, "max_model_len": 256, "kv_cache_memory_bytes": 2**26}
PROMPT = [11, 12, 13, 200, 201]


def requests(count: int = 2) -> list[RequestSpec]:
    return [make_request([*PROMPT, i], ordinal=i, seed=i, max_tokens=6, logprobs=1) for i in range(count)]


def compared(a: dict[str, Any], b: dict[str, Any], worker_module: str = "sempre.workers") -> Comparison:
    return compare_settings(ALONE | a, ALONE | b | {"worker_module": worker_module}, requests())


def test_another_kernel_is_named() -> None:
    here = ALONE | {"multiprocessing": False}
    found = compare_settings(here, here | {"numerics": "control"}, requests())
    assert not found.equal
    assert found.operation is not None
    assert found.operation.path == "model.layers.0.self_attn.qkv_proj"
    first, second = str(found).splitlines()
    assert first.startswith("request 0 ('0'), output position 0: ")
    assert second.startswith("first operation that differs: model.layers.0.self_attn.qkv_proj (")


@pytest.mark.product
def test_workers_without_modules_are_compared_by_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_TEST_ODDITY", "another token")
    light = {"model": "tiny", "worker_module": "light_worker"}
    odd = light | {"worker_module": "odd_workers", "data_parallel_size": 2}
    found = compare_settings(light, odd, requests())
    first, second = str(found).splitlines()
    assert re.fullmatch(r"request 1 \('1'\), output position 3: token \d+ against 9", first)
    assert second == "modules were not compared: method: no worker method 'trace_modules'"


@pytest.mark.product
@pytest.mark.parametrize(
    ("layout", "profile"),
    [
        ({"tensor_parallel_size": 2}, "tree8"),
        ({"pipeline_parallel_size": 2}, "single"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "tree8"),
        ({"data_parallel_size": 2}, "single"),
    ],
    ids=str,
)
def test_a_layout_is_equal_to_one_worker_and_shares_its_first_difference(layout: dict[str, Any], profile: str) -> None:
    assert str(compared({"numerics_profile": profile}, layout)) == "equal"
    if profile == "tree8":
        # of ranks, the fused projections are parts; the first whole result is the sum over heads, in another order
        found, first = compared({"numerics_profile": "single"}, layout), "o_proj"
    else:
        found, first = compared({}, layout | {"numerics": "control"}), "qkv_proj"
    assert found.operation is not None, found
    assert found.operation.path == f"model.layers.0.self_attn.{first}"


@pytest.mark.product
def test_a_partial_that_all_ranks_drop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No comparison of ranks finds it: they are all wrong alike."""
    monkeypatch.setenv("SEMPRE_TEST_FAULT", "every rank drops a partial")
    found = compared({"numerics_profile": "tree8"}, {"tensor_parallel_size": 2}, "rank_workers")
    assert found.operation is not None, found
    assert found.operation.path == "model.layers.0.self_attn.o_proj"
