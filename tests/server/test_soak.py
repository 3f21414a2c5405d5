"""Long use: nothing is lost, KV blocks come back, memory stays, answers are bit-equal to their lone ones."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from server_process import ServerProcess
from soak import PROBE, soak

FLAGS = ("--max-model-len", "256", "--max-num-seqs", "64", "--no-enable-access-log")


def check(log_path: Path, *, num_requests: int, concurrency: int, num_probes: int) -> None:
    with ServerProcess(log_path, *FLAGS) as server:
        alone = server.complete(**PROBE).json()["choices"]
        # allocators reach their plateau under the same load
        soak(server, num_requests=max(300, num_requests // 10), concurrency=concurrency, num_probes=5, seed=1)
        server.wait_until_idle()
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        tally = soak(server, num_requests=num_requests, concurrency=concurrency, num_probes=num_probes, seed=2)
        server.wait_until_idle()
        grown = process.memory_info().rss - before
        print(f"{tally.finished} finished, {tally.cancelled} cancelled, RSS grew by {grown / 2**20:.1f} MB")
        assert tally.lost == []
        assert tally.finished + tally.cancelled == num_requests
        assert tally.cancelled > num_requests // 50
        assert len(tally.probes) == num_probes
        assert all(probe == alone for probe in tally.probes)
        assert server.load()["kv_cache_usage_perc"] == [0.0]
        assert grown < 20 * 2**20
        other = server.complete(**{**PROBE, "seed": 12}).json()["choices"]
        assert other[0]["token_ids"] != alone[0]["token_ids"]


def test_short_soak(tmp_path: Path) -> None:
    check(tmp_path / "log", num_requests=400, concurrency=32, num_probes=10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_long_soak(tmp_path: Path) -> None:
    check(tmp_path / "log", num_requests=20_000, concurrency=128, num_probes=200)
