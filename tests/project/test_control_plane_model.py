"""The simulation of many workers gives what can be worked out by hand. Costs are powers of two, so sums are exact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLAN, SEND, RECEIVE, WORKER, HERE, AWAY = 2**-9, 2**-12, 2**-13, 2**-11, 2**-10, 2**-7
COMPUTE = 2**-2


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    model = import_module("control_plane_model")
    costs = model.Costs(PLAN, SEND, RECEIVE, WORKER, HERE, AWAY, step_bytes=100, result_bytes=50)

    def run(*layout: Any, compute_s: float = COMPUTE, in_flight: int = 1) -> Any:
        return model.Simulation(costs, model.Layout(*layout), compute_s=compute_s, in_flight=in_flight).run()

    return run


def test_one_worker_and_eight(simulated: Callable[..., Any]) -> None:
    for ranks in (1, 8):
        found = simulated(1, ranks)
        expected = PLAN + ranks * SEND + 2 * HERE + WORKER + ranks * RECEIVE
        assert found.overhead_median_s == found.overhead_p99_s == expected
        load = (PLAN + ranks * (SEND + RECEIVE)) / (COMPUTE + expected)
        assert found.coordinator_load == pytest.approx(load, rel=0.01)
        assert found.bytes_between_hosts_per_step == 0


def test_a_step_that_is_planned_ahead_costs_nothing(simulated: Callable[..., Any]) -> None:
    assert simulated(1, 8, in_flight=2).overhead_median_s == 0.0
    # unless it is computed faster than it is planned
    assert simulated(1, 8, in_flight=2, compute_s=2**-9).overhead_median_s > 0.0


def test_hosts(simulated: Callable[..., Any]) -> None:
    """Ranks of the other host decide; a relay spares the coordinator messages, and costs two hops."""
    direct, by_host = simulated(1, 8, 2), simulated(1, 8, 2, "by host")
    assert direct.overhead_median_s == PLAN + 8 * SEND + 2 * AWAY + WORKER + RECEIVE * 4
    assert direct.bytes_between_hosts_per_step == 4 * 150
    relayed = 2 * SEND + 4 * SEND + 4 * RECEIVE + 2 * HERE + RECEIVE
    assert by_host.overhead_median_s == PLAN + relayed + 2 * AWAY + WORKER
    assert by_host.bytes_between_hosts_per_step == 150
    assert by_host.coordinator_load < direct.coordinator_load


def test_a_coordinator_that_cannot_keep_up_decides_the_speed(simulated: Callable[..., Any]) -> None:
    found = simulated(64, 8, compute_s=2**-9)
    assert found.coordinator_load == pytest.approx(1.0, abs=0.01)
    own = PLAN + 8 * (SEND + RECEIVE)
    assert found.overhead_median_s == pytest.approx(64 * own - 2**-9, rel=0.02)
