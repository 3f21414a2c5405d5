"""Faults as data: what happens to the processes and links of a cluster while requests run, and what becomes of them.

scenario = Scenario("a rank is killed", process_faults=(ProcessFault("kill", 1, after_s=0.2),))
report = run_scenario(scenario, requests, "tiny", tensor_parallel_size=2)
assert report.problems(expected) == []
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from sempre.engine.harness.cluster import COORDINATOR, Cluster
from sempre.engine.harness.comparison import compare_generations
from sempre.engine.harness.faults import Fault
from sempre.engine.harness.generation import Generation, Outcome, outcomes
from sempre.engine.harness.processes import (
    command_line,
    is_running,
    slow_down,
    stop_for,
    without_more_memory,
    workers_of,
)
from sempre.ipc.errors import SempreError
from sempre.ipc.messages import RequestSpec

_APPEARS_WITHIN_S = 10.0
_ENDS_WITHIN_S = 5.0
_LOOK_S = 0.02


@dataclass(frozen=True)
class ProcessFault:
    """Harm to the process of a rank, or to COORDINATOR, `after_s` seconds after the requests were sent.

    kill: SIGKILL. stop: SIGSTOP for `for_s`. slow: for `for_s` it runs `share` of the time, as before a slow disk or on
    a crowded machine. starve: for `for_s` it gets no more memory than it has, so that allocations fail. Of a rank that
    is being restarted it is the successor, as soon as there is one.
    """

    action: Literal["kill", "stop", "slow", "starve"]
    target: int | str
    after_s: float = 0.0
    for_s: float = 1.0
    share: float = 0.1


@dataclass(frozen=True)
class Scenario:
    """Faults that happen while requests run."""

    name: str
    process_faults: tuple[ProcessFault, ...] = ()
    worker_faults: tuple[Fault, ...] = ()
    """of the links between coordinator and workers"""
    client_faults: tuple[Fault, ...] = ()
    """of the link between coordinator and this process"""


@dataclass
class ScenarioReport:
    """How the requests of a scenario ended, and what was left."""

    scenario: Scenario
    outcomes: list[Outcome] = field(default_factory=list)
    happened: list[Fault | ProcessFault] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    """processes and folders that the engine should have removed"""

    def problems(self, expected: Sequence[Generation]) -> list[str]:
        """What is not as promised: each request ends with the bits of an undisturbed run, or with an error that tells
        the cause; every fault has happened; nothing is left behind."""
        scenario = self.scenario
        planned = [*scenario.process_faults, *scenario.worker_faults, *scenario.client_faults]
        return [
            *filter(None, (_problem(*pair) for pair in zip(self.outcomes, expected, strict=True))),
            *(f"{fault} did not happen" for fault in planned if fault not in self.happened),
            *(f"{name} is left behind" for name in self.left_behind),
        ]

    @property
    def errors(self) -> list[str]:
        """Of the requests that failed."""
        return [str(outcome.error) for outcome in self.outcomes if outcome.error is not None]


def run_scenario(
    scenario: Scenario, requests: Sequence[RequestSpec], model: str, *, timeout_s: float = 60.0, **settings: Any
) -> ScenarioReport:
    """Start a cluster, run the requests while the faults happen, end the cluster. `settings` are those of Cluster.

    Raises the errors of a start; those of a request, or of the whole engine, are in the report.
    """
    report = ScenarioReport(scenario)
    cluster = Cluster(model, worker_faults=[], client_faults=[], **settings)
    try:
        links = [(cluster.worker_proxy, scenario.worker_faults), (cluster.client_proxy, scenario.client_faults)]
        for proxy, faults in links:
            assert proxy is not None
            for fault in faults:
                proxy.inject(fault)
        with _Harm(cluster, scenario.process_faults) as harm:
            report.outcomes = outcomes(cluster.client, requests, timeout_s=timeout_s)
        report.happened += harm.happened
        for proxy, _ in links:
            assert proxy is not None
            report.happened += proxy.struck()
    finally:
        cluster.close()
    report.left_behind = _left_behind(cluster, harm.coordinators)
    return report


class _Harm:
    """Does what process faults say, each in a thread of its own, while the context lasts."""

    def __init__(self, cluster: Cluster, faults: Sequence[ProcessFault]) -> None:
        self.happened: list[ProcessFault] = []
        self.coordinators = {cluster.coordinator_pid}
        self._cluster = cluster
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._harm, args=[fault], name=fault.action) for fault in faults]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.coordinators.add(self._cluster.coordinator_pid)

    def _harm(self, fault: ProcessFault) -> None:
        if self._ended.wait(fault.after_s):
            return
        pid = self._process(fault.target)
        if pid is None:
            return
        # it may end by itself just now
        with suppress(ProcessLookupError, FileNotFoundError):
            match fault.action:
                case "kill":
                    os.kill(pid, signal.SIGKILL)
                case "stop":
                    stop_for(pid, self._ended.wait, fault.for_s)
                case "slow":
                    slow_down(pid, self._ended.wait, fault.for_s, fault.share)
                case "starve":
                    with without_more_memory(pid):
                        self._ended.wait(fault.for_s)
            self.happened.append(fault)

    def _process(self, target: int | str) -> int | None:
        """The process of a target, once there is one."""
        deadline = time.monotonic() + _APPEARS_WITHIN_S
        while time.monotonic() < deadline:
            if target == COORDINATOR:
                pid = self._cluster.coordinator_pid
                self.coordinators.add(pid)
                if is_running(pid):
                    return pid
            for pid, rank in workers_of(self._cluster.directory.path).items():
                if rank == target:
                    return pid
            if self._ended.wait(_LOOK_S):
                return None
        return None


def _problem(outcome: Outcome, expected: Generation) -> str | None:
    name = f"request {expected.request_id!r}"
    match outcome.error:
        case None:
            return compare_generations([expected], [outcome.generation]).first_difference
        case TimeoutError():
            return f"{name} is lost: {outcome.error}"
        case SempreError() if not str(outcome.error):
            return f"{name} failed without a cause"
    # what arrived before the error must have the bits, too
    count = len(outcome.generation.token_ids)
    if outcome.generation.token_ids != expected.token_ids[:count]:
        return f"{name} differs before its error: {outcome.generation.token_ids} against {expected.token_ids[:count]}"
    return None


def _left_behind(cluster: Cluster, coordinators: set[int]) -> list[str]:
    """Processes and folders, a moment after the end."""
    folder = cluster.directory.path
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while True:
        found = [f"worker {rank} (pid {pid})" for pid, rank in workers_of(folder).items()]
        found += [
            f"coordinator (pid {pid})" for pid in coordinators if "sempre.engine.coordinator" in command_line(pid)
        ]
        if folder.exists():
            found.append(str(folder))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(_LOOK_S)
