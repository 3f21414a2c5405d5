"""Helpers for tests of whole engines: every test checks that no process and no folder is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sempre.engine.harness import Cluster, make_request
from sempre.ipc.messages import RequestSpec

GONE_WITHIN_S = 5.0
HERE = Path(__file__).parent
SUPPORT = HERE.parents[1] / "support"


def is_running(pid: int) -> bool:
    """Whether the process is there and not just waiting to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until_gone(pids: Iterable[int]) -> list[int]:
    """The processes that still run after `GONE_WITHIN_S`."""
    deadline = time.monotonic() + GONE_WITHIN_S
    remaining = list(pids)
    while remaining and time.monotonic() < deadline:
        time.sleep(0.02)
        remaining = [pid for pid in remaining if is_running(pid)]
    return remaining


@pytest.fixture(autouse=True, scope="module")
def _workers_of_tests() -> Iterator[None]:
    """The worker programs of this folder and of the tests' support can be started by name."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (HERE, SUPPORT):
            patch.setenv("PYTHONPATH", str(folder), prepend=":")
        yield


@pytest.fixture
def gone() -> Callable[[Iterable[int]], list[int]]:
    return wait_until_gone


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """Start clusters of workers without a model; at the end nothing of them may be left."""
    clusters: list[Cluster] = []

    def start_cluster(worker_module: str = "light_worker", **settings: Any) -> Cluster:
        clusters.append(Cluster("tiny", worker_module=worker_module, **settings))
        return clusters[-1]

    yield start_cluster
    for cluster in clusters:
        cluster.close()
    pids = [pid for cluster in clusters for pid in (cluster.coordinator_pid, *cluster.worker_pids())]
    assert wait_until_gone(pids) == []
    assert not [cluster.directory.path for cluster in clusters if cluster.directory.path.exists()]


@pytest.fixture
def start_odd(start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """Start clusters of workers that go wrong in the given way."""

    def start_odd_cluster(oddity: str, **settings: Any) -> Cluster:
        monkeypatch.setenv("SEMPRE_TEST_ODDITY", oddity)
        return start(worker_module="odd_workers", **settings)

    return start_odd_cluster


@pytest.fixture
def requests() -> Callable[..., list[RequestSpec]]:
    """Make `count` requests that differ in prompt, seed and length."""

    def make(count: int = 4, first: int = 0, max_tokens: int = 6) -> list[RequestSpec]:
        return [
            make_request(
                [7, 8, first + i], seed=first + i, ordinal=first + i, max_tokens=max_tokens + i % 3, logprobs=0
            )
            for i in range(count)
        ]

    return make
