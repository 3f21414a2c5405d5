"""From what the coordinator reports of its workers to a verdict that names the rank."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.health import judge, unhealthy
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import EngineUnhealthy
from sempre.ipc.messages import StalledRequests, WorkerHealth

CONFIG = EngineConfig(model="m", model_path="/", heartbeat_interval_s=0.5, heartbeat_timeout_s=30.0)


def report(rank: int = 0, **fields: Any) -> WorkerHealth:
    return WorkerHealth(**{"rank": rank, "pid": 7, "state": "ready", "heartbeat_age_s": 0.1} | fields)


def test_a_healthy_engine() -> None:
    health = judge([report(), report(1, step_age_s=119.0, last_step_age_s=5000.0)], CONFIG)
    assert (health.state, health.healthy, [worker.rank for worker in health.workers]) == ("ready", True, [0, 1])
    health.check()


@pytest.mark.parametrize(
    ("fields", "state", "text"),
    [
        ({"heartbeat_age_s": 5.1}, "ready", r"worker 1 \(pid 7\) was last heard 5.1 s ago"),
        ({"step_age_s": 121.0}, "ready", r"worker 1 \(pid 7\) is stuck in a step for 121.0 s \(step_timeout_s=120\)"),
        ({"state": "restarting", "cause": "killed by SIGKILL"}, "restarting", "worker 1 .* is restarting: killed by"),
        ({"state": "starting"}, "restarting", "worker 1 .* is starting$"),
    ],
)
def test_a_worker_that_is_not_well_is_named(fields: dict[str, Any], state: str, text: str) -> None:
    health = judge([report(), report(1, **fields)], CONFIG)
    assert (health.state, health.healthy) == (state, False)
    with pytest.raises(EngineUnhealthy, match=text) as error:
        health.check()
    assert error.value.rank == 1


def test_the_timeout_bounds_the_patience_with_heartbeats() -> None:
    config = EngineConfig(model="m", model_path="/", heartbeat_interval_s=0.5, heartbeat_timeout_s=1.0)
    assert not judge([report(heartbeat_age_s=1.5)], config).healthy


def test_requests_that_do_not_move_are_told() -> None:
    stalled = [StalledRequests(rank=1, num_requests=1, request_id="a", age_s=121.0)]
    with pytest.raises(
        EngineUnhealthy, match=r"request 'a' of worker 1 has not moved for 121.0 s \(step_timeout_s=120"
    ):
        judge([report(), report(1)], CONFIG, stalled).check()
    stalled = [StalledRequests(rank=1, num_requests=3, request_id="a", age_s=121.0)]
    with pytest.raises(EngineUnhealthy, match=r"3 requests of worker 1, 'a' the first of them, have not moved"):
        judge([report(), report(1)], CONFIG, stalled).check()
    # what stops them is told already
    [problem] = judge([report(), report(1, step_age_s=121.0)], CONFIG, stalled).problems
    assert "is stuck in a step" in problem.text


def test_an_engine_that_cannot_be_asked() -> None:
    with pytest.raises(EngineUnhealthy, match="the engine is dead: why") as error:
        unhealthy("dead", "why").check()
    assert error.value.rank is None
