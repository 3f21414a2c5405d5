"""Restarts of workers without a model: who is suspected, what waits, what is left behind."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable

import psutil
import pytest

from sempre.engine.harness import COORDINATOR, Cluster, Generation, make_request
from sempre.ipc.errors import CoordinatorDied, EngineDeadError, RequestCrashed, WorkerDied
from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    OutputsReady,
    RequestSpec,
)

Start = Callable[..., Cluster]
Gone = Callable[[Iterable[int]], list[int]]
Make = Callable[..., list[RequestSpec]]
DEADLY = 13
BEAT = {"heartbeat_interval_s": 0.05, "heartbeat_timeout_s": 0.6}


def deadly(ordinal: int) -> RequestSpec:
    """Ends the odd worker "dies of a request" at its fifth token, whatever else is in the step."""
    return make_request([DEADLY, 1], ordinal=ordinal, max_tokens=20)


def tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def collect(cluster: Cluster, specs: list[RequestSpec], timeout_s: float = 60.0) -> dict[str, tuple[list[int], object]]:
    """Tokens and end of each request, errors included."""
    found: dict[str, tuple[list[int], object]] = {spec.request_id: ([], None) for spec in specs}
    unfinished = set(found)
    deadline = time.monotonic() + timeout_s
    while unfinished:
        event = cluster.client.receive(max(0.0, deadline - time.monotonic()))
        assert event is not None, f"{unfinished} are unfinished"
        if isinstance(event, OutputsReady):
            for delta in event.outputs:
                ids, _ = found[delta.request_id]
                ids += delta.token_ids
                found[delta.request_id] = (ids, delta.error or delta.finish_reason)
                if delta.finish_reason is not None:
                    unfinished.remove(delta.request_id)
    return found


@pytest.mark.parametrize("target", [0, 1, COORDINATOR])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_requests_go_on(start: Start, gone: Gone, requests: Make, target: int | str, how: str) -> None:
    specs = requests(24, max_tokens=300)
    cluster = start(data_parallel_size=2, **BEAT)
    expected = cluster.generate(specs)
    before = [cluster.coordinator_pid, *cluster.worker_pids()]
    cluster.call("slow", 0.01)  # until the harm, so that it finds them at work
    cluster.client.send(AddRequests(requests=specs))
    found: dict[str, list[int]] = {spec.request_id: [] for spec in specs}
    unfinished = set(found)
    while unfinished:
        event = cluster.client.receive(20)
        assert isinstance(event, OutputsReady)
        for delta in event.outputs:
            found[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                unfinished.remove(delta.request_id)
        if how and len(found[specs[0].request_id]) >= 5:
            getattr(cluster, how)(target)
            how = ""
    assert [found[spec.request_id] for spec in specs] == tokens(expected)
    after = [cluster.coordinator_pid, *cluster.worker_pids()]
    replaced = [old for old, new in zip(before, after, strict=True) if old != new]
    assert replaced == (before if target == COORDINATOR else [before[1 + int(target)]])
    assert gone(replaced) == []


@pytest.mark.parametrize("target", [0, COORDINATOR])
def test_an_idle_engine_recovers(start: Start, requests: Make, target: int | str) -> None:
    cluster = start()
    expected = cluster.generate(requests(3))
    for _ in range(2):
        cluster.kill(target)
        assert tokens(cluster.generate(requests(3))) == tokens(expected)
        assert cluster.call("ping") == ["pong"]


def test_a_deadly_request_fails_alone_and_is_forgiven(start_odd: Start, requests: Make) -> None:
    """With a budget of three, two deadly requests would end the engine if their crashes went on counting."""
    specs = requests(6, max_tokens=40)
    cluster = start_odd("dies of a request", max_restarts=3)
    expected = tokens(cluster.generate(specs))
    for ordinal in (100, 101):
        killer = deadly(ordinal)
        everyone = [*specs[:3], killer, *specs[3:]]
        cluster.client.send(AddRequests(requests=everyone))
        found = collect(cluster, everyone)
        assert [found[spec.request_id] for spec in specs] == [(ids, "length") for ids in expected]
        ids, error = found[killer.request_id]
        assert len(ids) == 4
        assert getattr(error, "type", None) == RequestCrashed.__name__
        assert "was being computed in 3 crashes of its worker, the last: killed by SIGKILL" in str(error)
    assert cluster.ranks()[0].num_restarts == 6
    assert cluster.metrics()["worker_restarts"] == [6.0]


def test_requests_that_were_not_in_the_step_are_not_suspected(start_odd: Start) -> None:
    """One sequence at a time: those that wait are in no crash, so nobody else fails although all crashes are theirs."""
    cluster = start_odd("dies of a request", max_num_seqs=1, max_restarts=3)
    specs = [deadly(0), *(make_request([5, i], ordinal=i, max_tokens=9) for i in range(1, 5))]
    cluster.client.send(AddRequests(requests=specs))
    found = collect(cluster, specs)
    assert [end if isinstance(end, str) else "error" for _, end in found.values()] == ["error"] + ["length"] * 4


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a coordinator, in the order of their ranks."""
    try:
        children = psutil.Process(pid).children()
        return sorted((c for c in children if "--rank" in c.cmdline()), key=lambda c: c.cmdline())
    except psutil.NoSuchProcess:
        return []


def receive_until(cluster: Cluster, condition: Callable[[], object], found: dict[str, list[int]]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        event = cluster.client.receive(0.002)
        if isinstance(event, OutputsReady):
            for delta in event.outputs:
                found[delta.request_id] += delta.token_ids


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.product)])
@pytest.mark.parametrize("during", ["the start of a coordinator", "the start of its workers", "the start of a worker"])
def test_a_fault_during_a_repair_is_repaired(
    start_odd: Start, requests: Make, during: str, how: signal.Signals
) -> None:
    """Whoever dies or stops while a successor is starting: the coordinator, its workers, the successor of a worker."""
    specs = requests(8, max_tokens=120)
    cluster = start_odd("loads slowly", data_parallel_size=2, **BEAT)
    expected = tokens(cluster.generate(specs))
    found: dict[str, list[int]] = {spec.request_id: [] for spec in specs}
    cluster.client.send(AddRequests(requests=specs))
    receive_until(cluster, lambda: all(len(ids) >= 3 for ids in found.values()), found)
    first = cluster.coordinator_pid
    if during == "the start of a worker":
        before = cluster.worker_pids()
        cluster.kill(1)
        receive_until(cluster, lambda: cluster.worker_pids()[1] != before[1], found)
        victims = [cluster.worker_pids()[1]]
    else:
        cluster.kill(COORDINATOR)
        receive_until(cluster, lambda: cluster.coordinator_pid != first, found)
        victims = [cluster.coordinator_pid]
        if during == "the start of its workers":
            receive_until(cluster, lambda: len(workers_of(cluster.coordinator_pid)) == 2, found)
            victims = [worker.pid for worker in workers_of(cluster.coordinator_pid)]
    for pid in victims:
        os.kill(pid, how)
    receive_until(cluster, lambda: [*found.values()] == expected, found)
    assert not set(victims) & {cluster.coordinator_pid, *cluster.worker_pids()}


@pytest.mark.parametrize("target", [0, COORDINATOR])
def test_faults_during_repairs_are_counted(start: Start, gone: Gone, target: int | str) -> None:
    """They come to one clear end, that of the budget, and every later call is told of it by an error of its own."""
    cluster = start(max_restarts=2)
    engine: list[int] = []
    cluster.client.send(AddRequests(requests=[make_request([1], ordinal=1, max_tokens=4000)]))
    cluster.client.receive(20)

    def kill_whoever_comes() -> None:
        cluster.kill(COORDINATOR)
        while True:
            cluster.client.receive(0.002)
            workers = [worker.pid for worker in workers_of(cluster.coordinator_pid)]
            for pid in [cluster.coordinator_pid] if target == COORDINATOR else workers:
                if pid not in engine:
                    engine.append(pid)
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises((CoordinatorDied, WorkerDied), match=r"it was restarted 2 times within 600 s") as death:
        kill_whoever_comes()
    assert gone([cluster.coordinator_pid, *engine]) == []
    depths = set()
    for _ in range(5):
        with pytest.raises(EngineDeadError) as again:
            cluster.client.send(AddRequests(requests=[make_request([1], ordinal=2)]))
        assert (again.value is not death.value, str(again.value)) == (True, str(death.value))
        depths.add(len(traceback.extract_tb(again.value.__traceback__)))
    assert len(depths) == 1


def test_a_spent_budget_ends_the_engine(start: Start, gone: Gone) -> None:
    for target, kind in ((0, WorkerDied), (COORDINATOR, CoordinatorDied)):
        cluster = start(max_restarts=1)
        cluster.kill(target)
        assert len(cluster.generate([make_request([1], ordinal=1)])) == 1
        engine = [cluster.coordinator_pid, *cluster.worker_pids()]
        cluster.kill(target)
        with pytest.raises(kind, match=r"killed by SIGKILL(.|\n)*restarted 1 times within 600 s") as death:
            cluster.generate([make_request([1], ordinal=2)])
        assert death.value.exitcode == -signal.SIGKILL
        assert gone(engine) == []


@pytest.mark.parametrize("target", [0, COORDINATOR])
def test_a_successor_keeps_the_limits_that_were_chosen(start_odd: Start, target: int | str) -> None:
    cluster = start_odd("limits of its own")
    ready = cluster.ready
    cluster.kill(target)
    assert len(cluster.generate([make_request([1], ordinal=2)])) == 1
    assert (cluster.ready.max_model_len, cluster.ready.max_num_seqs) == (ready.max_model_len, ready.max_num_seqs)


def test_a_successor_that_differs_is_refused(start_odd: Start, gone: Gone) -> None:
    cluster = start_odd("successor is seeded differently")
    engine = [cluster.coordinator_pid, *cluster.worker_pids()]
    cluster.kill(0)
    with pytest.raises(Exception, match="rank 0 is seeded differently from the worker that it replaces"):
        cluster.generate([make_request([1], ordinal=2)])
    assert gone(engine) == []


def test_a_stuck_step_is_told_while_heartbeats_go_on(start: Start) -> None:
    cluster = start(**BEAT)
    cluster.call("slow", 1.0)
    cluster.client.send(AddRequests(requests=[make_request([1], ordinal=1, max_tokens=30)]))
    deadline = time.monotonic() + 20
    while True:
        (worker,) = cluster.ranks()
        assert worker.state == "ready"
        assert worker.heartbeat_age_s is not None
        if worker.step_age_s is not None and worker.step_age_s > 0.3 > worker.heartbeat_age_s:
            break
        assert time.monotonic() < deadline, f"step {worker.step_age_s} s, heartbeat {worker.heartbeat_age_s} s"
        time.sleep(0.02)


def test_aborts_and_requests_of_an_outage(start: Start, requests: Make) -> None:
    specs = requests(4, max_tokens=200)
    cluster = start()
    expected = tokens(cluster.generate(specs))
    cluster.client.send(AddRequests(requests=specs[:2]))
    cluster.client.receive(20)
    cluster.kill(COORDINATOR)
    while cluster.client.outage is None:
        cluster.client.receive(0.05)
    cluster.client.send(AbortRequests(request_ids=[specs[0].request_id]))
    assert tokens(cluster.generate(specs[2:])) == expected[2:]
    assert cluster.metrics()["num_requests_running"] in ([0.0], [1.0])
