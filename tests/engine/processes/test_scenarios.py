"""Faults of processes and links while 32 requests run on four workers: equal bits or a named error, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sempre.engine.harness import (
    COORDINATOR,
    Fault,
    Generation,
    ProcessFault,
    Scenario,
    ScenarioReport,
    make_request,
    run_scenario,
)
from sempre.engine.harness.generation import Outcome
from sempre.ipc.errors import WorkerDied
from sempre.ipc.messages import RequestSpec

SETTINGS: dict[str, Any] = {
    "data_parallel_size": 2,
    "tensor_parallel_size": 2,
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 1.0,
    "max_restarts": 20,
    "max_request_crashes": 20,
    "worker_module": "light_worker",
}
Start = Callable[..., Any]

HARMLESS = [
    Scenario("a rank is killed", (ProcessFault("kill", 1, after_s=0.2),)),
    Scenario("two ranks of two replicas are killed", (ProcessFault("kill", 0, 0.2), ProcessFault("kill", 3, 0.2))),
    Scenario("a rank is killed, then its successor", (ProcessFault("kill", 2, 0.2), ProcessFault("kill", 2, 0.5))),
    Scenario("a rank stops for a moment", (ProcessFault("stop", 1, 0.2, for_s=0.5),)),
    Scenario("a rank stops for too long", (ProcessFault("stop", 1, 0.2, for_s=5.0),)),
    Scenario("a rank is slow", (ProcessFault("slow", 3, 0.1, for_s=2.0, share=0.3),)),
    Scenario(
        "a successor loads slowly", (ProcessFault("kill", 0, 0.2), ProcessFault("slow", 0, 0.22, for_s=3.0, share=0.2))
    ),
    Scenario("a rank gets no memory", (ProcessFault("starve", 1, 0.2, for_s=1.0),)),
    Scenario("the coordinator is killed", (ProcessFault("kill", COORDINATOR, 0.3),)),
    Scenario("the coordinator stops for a moment", (ProcessFault("stop", COORDINATOR, 0.3, for_s=0.5),)),
    Scenario("frames of workers are late", worker_faults=(Fault("delay", "up", "StepResult", 20, delay_s=0.3),)),
    Scenario("a frame of a worker comes twice", worker_faults=(Fault("duplicate", "up", "StepResult", 30),)),
    Scenario("a step comes twice", worker_faults=(Fault("duplicate", "down", "ExecuteStep", 30),)),
    Scenario("a frame of a worker is lost", worker_faults=(Fault("drop", "up", "StepResult", 40),)),
    Scenario("a step is lost", worker_faults=(Fault("drop", "down", "ExecuteStep", 40),)),
    Scenario("a frame of a worker is corrupt", worker_faults=(Fault("corrupt", "up", "StepResult", 25),)),
    Scenario("a step is corrupt", worker_faults=(Fault("corrupt", "down", "ExecuteStep", 25),)),
    Scenario("frames of a worker change places", worker_faults=(Fault("reorder", "up", "StepResult", 30),)),
    Scenario("steps change places", worker_faults=(Fault("reorder", "down", "ExecuteStep", 30),)),
    Scenario("workers are cut off for a moment", worker_faults=(Fault("partition", "up", "StepResult", 30, 0.5),)),
    Scenario("workers are cut off for long", worker_faults=(Fault("partition", "up", "StepResult", 30, 3.0),)),
    Scenario("the client is cut off for a moment", client_faults=(Fault("partition", "down", "OutputsReady", 9, 0.5),)),
    Scenario(
        "much at once",
        (ProcessFault("kill", 1, 0.3), ProcessFault("slow", 3, 0.1, for_s=1.0, share=0.4)),
        worker_faults=(Fault("corrupt", "up", "StepResult", 50), Fault("delay", "down", "ExecuteStep", 9)),
    ),
]
ALWAYS = ("a rank is killed",)


def requests() -> list[RequestSpec]:
    return [make_request([7, 8, i], seed=i, ordinal=i, max_tokens=50 + i % 7, logprobs=0) for i in range(32)]


@pytest.fixture(autouse=True)
def _steps_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_TEST_STEP_SECONDS", "0.02")


@pytest.fixture(scope="module")
def expected() -> list[Generation]:
    report = run_scenario(Scenario("nothing"), requests(), "tiny", worker_module="light_worker")
    assert report.errors == report.left_behind == []
    return [outcome.generation for outcome in report.outcomes]


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(each, marks=() if each.name in ALWAYS else pytest.mark.product, id=each.name) for each in HARMLESS],
)
def test_requests_go_on_with_equal_bits(scenario: Scenario, expected: list[Generation]) -> None:
    report = run_scenario(scenario, requests(), "tiny", **SETTINGS)
    assert report.problems(expected) == []
    assert report.errors == []


@pytest.mark.product
@pytest.mark.parametrize("action", ["drop", "corrupt", "reorder"])
def test_what_is_lost_for_the_client_is_an_error_that_says_so(action: Any, expected: list[Generation]) -> None:
    scenario = Scenario(action, client_faults=(Fault(action, "down", "OutputsReady", 9),))
    report = run_scenario(scenario, requests(), "tiny", **SETTINGS)
    assert report.problems(expected) == []
    assert len(report.errors) == 32
    assert all("sequence: expected frame" in error or "checksum" in error for error in report.errors)


@pytest.mark.product
def test_an_engine_that_may_not_restart_ends_with_the_cause(expected: list[Generation]) -> None:
    scenario = Scenario("killed", (ProcessFault("kill", 2, after_s=0.2),))
    report = run_scenario(scenario, requests(), "tiny", **(SETTINGS | {"max_restarts": 0}))
    assert report.problems(expected) == []
    assert all("worker 2" in error and "killed by SIGKILL" in error for error in report.errors)
    assert len(report.errors) == 32


def test_a_report_finds_what_is_wrong() -> None:
    """The control: other bits, a request that never ended, a fault that did not happen, a process that is left."""
    wanted = [Generation(str(i), token_ids=[1, 2]) for i in range(4)]
    fault = ProcessFault("kill", 0)
    other, lost, died = Generation("1", token_ids=[1, 3]), Generation("2"), Generation("3", token_ids=[2])
    found = [
        Outcome(wanted[0]),
        Outcome(other),
        Outcome(lost, TimeoutError("1 of 4 requests unfinished")),
        Outcome(died, WorkerDied("killed", rank=0)),
    ]
    report = ScenarioReport(Scenario("s", (fault,)), found, left_behind=["worker 0 (pid 9)"])
    assert report.problems(wanted) == [
        "request 0 ('1'), output position 1: token 2 against 3",
        "request '2' is lost: 1 of 4 requests unfinished",
        "request '3' differs before its error: [2] against [1]",
        f"{fault} did not happen",
        "worker 0 (pid 9) is left behind",
    ]
