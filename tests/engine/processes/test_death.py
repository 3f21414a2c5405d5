"""Every process is killed in turn, restarts off: the user is told who died and why, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from sempre.engine.executor.local import LocalExecutor
from sempre.engine.harness import COORDINATOR, Cluster, make_request
from sempre.ipc.config import EngineConfig
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.errors import CoordinatorDied, ProtocolError, StartupError, WorkerDied
from sempre.ipc.messages import AddRequests, RequestSpec, ShutdownWorker

Start = Callable[..., Cluster]
Gone = Callable[[Iterable[int]], list[int]]
NOTICED_WITHIN_S = 2.0


def endless() -> list[RequestSpec]:
    return [make_request([1, 2], ordinal=i, max_tokens=4000) for i in range(2)]


def keep_receiving(cluster: Cluster) -> None:
    """Receive until the engine is dead; its death must be noticed within the deadline, with or without work."""
    deadline = time.monotonic() + NOTICED_WITHIN_S
    while (remaining := deadline - time.monotonic()) > 0:
        cluster.client.receive(remaining)


def pids(cluster: Cluster) -> list[int]:
    return [cluster.coordinator_pid, *cluster.worker_pids()]


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_the_death_of_a_worker(start: Start, gone: Gone, busy: bool) -> None:
    cluster = start(max_restarts=0, data_parallel_size=2)
    if busy:
        cluster.client.send(AddRequests(requests=endless()))
        cluster.client.receive(10)
    cluster.kill(1)
    with pytest.raises(WorkerDied, match=r"worker 1 .* died: killed by SIGKILL") as death:
        keep_receiving(cluster)
    assert (death.value.rank, death.value.exitcode) == (1, -signal.SIGKILL)
    assert death.value.cause == "killed by SIGKILL"
    assert gone(pids(cluster)) == []
    with pytest.raises(WorkerDied, match="worker 1"):
        cluster.client.send(AddRequests(requests=endless()))


@pytest.mark.parametrize("dies", [True, False], ids=["it has died", "it lives"])
def test_why_a_worker_that_cannot_be_reached_is_gone(monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    """Its sockets close before its exit can be seen: what ended it is the cause, and not that it cannot be reached."""
    directory = PrivateDirectory.create()
    config = EngineConfig(model="scripted-light", model_path="/")
    executor = LocalExecutor(config, directory, client_pid=os.getpid(), worker_module="light_worker")
    try:
        deadline = time.monotonic() + 20
        while executor.receive() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pid = executor.health()[0].pid

        def unreachable(*_: object) -> None:
            if dies:
                os.kill(pid, signal.SIGKILL)
            raise ProtocolError("cannot reach peer")

        monkeypatch.setattr(executor._hub, "send", unreachable)
        with pytest.raises(StartupError) as death:
            executor.send(0, ShutdownWorker())
        assert death.value.cause == ("killed by SIGKILL" if dies else "cannot reach peer")
    finally:
        monkeypatch.undo()
        executor.shutdown()
        directory.remove()


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_the_death_of_the_coordinator(start: Start, gone: Gone, busy: bool) -> None:
    cluster = start(max_restarts=0, data_parallel_size=2)
    if busy:
        cluster.client.send(AddRequests(requests=endless()))
        cluster.client.receive(10)
    cluster.kill(COORDINATOR)
    with pytest.raises(CoordinatorDied, match="killed by SIGKILL") as death:
        keep_receiving(cluster)
    assert death.value.exitcode == -signal.SIGKILL
    assert gone(pids(cluster)) == []


def test_the_death_of_the_coordinator_takes_a_stopped_worker_along(start: Start, gone: Gone) -> None:
    cluster = start(max_restarts=0)
    cluster.stop(0)
    cluster.kill(COORDINATOR)
    with pytest.raises(CoordinatorDied):
        keep_receiving(cluster)
    assert gone(pids(cluster)) == []


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_worker_that_stops_answering(start: Start, gone: Gone, busy: bool) -> None:
    cluster = start(max_restarts=0, heartbeat_interval_s=0.05, heartbeat_timeout_s=0.6)
    if busy:
        cluster.client.send(AddRequests(requests=endless()))
        cluster.client.receive(10)
    cluster.stop(0)
    with pytest.raises(WorkerDied, match="no heartbeat for") as death:
        keep_receiving(cluster)
    assert death.value.rank == 0
    assert death.value.cause.startswith("no heartbeat for 0.")
    assert gone(pids(cluster)) == []


def test_a_worker_that_pauses_for_less_goes_on(start: Start) -> None:
    cluster = start(max_restarts=0, heartbeat_interval_s=0.05, heartbeat_timeout_s=5.0)
    cluster.client.send(AddRequests(requests=endless()))
    cluster.client.receive(10)
    cluster.stop(0)
    time.sleep(0.3)
    cluster.resume(0)
    assert cluster.generate([make_request([5], ordinal=9, max_tokens=3)])[0].finish_reason == "length"


def test_a_coordinator_that_stops_answering(start: Start, gone: Gone) -> None:
    cluster = start(max_restarts=0, heartbeat_interval_s=0.05, heartbeat_timeout_s=0.6)
    cluster.stop(COORDINATOR)
    with pytest.raises(CoordinatorDied, match="no heartbeat for"):
        keep_receiving(cluster)
    assert gone(pids(cluster)) == []


@pytest.mark.parametrize(
    ("oddity", "exitcode", "cause", "traceback"),
    [
        ("step crashes", 1, "ZeroDivisionError: in the middle of a step", "odd_workers.py"),
        ("step ends by a signal", -signal.SIGSEGV, "killed by SIGSEGV", "Fatal Python error: Segmentation fault"),
        ("step is answered out of turn", -9, "StepResult.step_id: expected 3, found 7", ""),
        ("step is answered for others", -9, "StepResult.sampled: expected 2 entries in step 3, found 1", ""),
        ("step has another rank", -9, "StepResult.rank: expected 0, found 5", ""),
        ("step is too large", 1, "MessageTooLarge: StepResult of", "max_message_bytes"),
    ],
)
def test_a_worker_that_fails_in_a_step(
    start_odd: Start, gone: Gone, oddity: str, exitcode: int, cause: str, traceback: str
) -> None:
    cluster = start_odd(oddity, max_restarts=0, max_message_bytes=1 << 16)
    with pytest.raises(WorkerDied) as death:
        cluster.generate(endless(), timeout_s=20)
    assert (death.value.rank, death.value.exitcode) == (0, exitcode)
    assert cause in death.value.cause
    assert traceback in death.value.worker_traceback
    assert gone(pids(cluster)) == []


PROGRAM = """
import sys, time
from sempre.engine.harness import Cluster, make_request
from sempre.ipc.messages import AddRequests
cluster = Cluster("tiny", worker_module="light_worker", data_parallel_size=2)
cluster.generate([make_request([1], max_tokens=3)])
print(cluster.directory.path, cluster.coordinator_pid, *cluster.worker_pids(), flush=True)
"""


def run_program(ending: str) -> tuple[subprocess.Popen[str], Path, list[int]]:
    """A user's script, without a `__main__` guard, that starts an engine and comes to `ending`."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM + ending], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    folder, *numbers = program.stdout.readline().split()
    return program, Path(folder), [int(number) for number in numbers]


IDLE = "time.sleep(60)"
BUSY = """
cluster.client.send(AddRequests(requests=[make_request([1], ordinal=i, max_tokens=4000) for i in range(1, 9)]))
cluster.client.receive(10)
time.sleep(60)
"""


@pytest.mark.parametrize("doing", [IDLE, BUSY], ids=["idle", "busy"])
@pytest.mark.parametrize("stopped", [None, 0, 1], ids=["all running", "coordinator stopped", "worker stopped"])
def test_the_death_of_the_user_s_process_takes_all_along(gone: Gone, stopped: int | None, doing: str) -> None:
    program, folder, engine = run_program(doing)
    if stopped is not None:
        os.kill(engine[stopped], signal.SIGSTOP)
    program.kill()
    program.communicate()
    assert gone(engine) == []
    assert not folder.exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["coordinator first", "workers first"])
def test_nobody_outlives_a_parent_that_dies_while_all_are_stopped(gone: Gone, order: tuple[int, ...]) -> None:
    program, folder, engine = run_program(BUSY)
    for pid in engine:
        os.kill(pid, signal.SIGSTOP)
    program.kill()
    program.communicate()
    for place in order:
        with suppress(ProcessLookupError):
            os.kill(engine[place], signal.SIGCONT)
        time.sleep(0.2)
    assert gone(engine) == []
    assert not folder.exists()


@pytest.mark.parametrize(
    ("ending", "exitcode"), [("", 0), ("raise ValueError", 1), ("sys.exit(3)", 3), ("del cluster; time.sleep(0)", 0)]
)
def test_a_script_that_ends_without_shutting_down_leaves_nothing(gone: Gone, ending: str, exitcode: int) -> None:
    program, folder, engine = run_program("sys.stderr = open('/dev/null', 'w')\n" + ending)
    program.communicate(timeout=20)
    assert program.returncode == exitcode
    assert gone(engine) == []
    assert not folder.exists()


def test_an_interrupt_reaches_the_user_s_process_alone(gone: Gone) -> None:
    """The engine is not in the terminal's foreground group: it outlives Ctrl-C for as long as the user's code does."""
    ending = """
try:
    print("waiting", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    assert len(cluster.generate([make_request([1], ordinal=5)])) == 1
    sys.exit(7)
"""
    program, _, engine = run_program(ending)
    assert program.stdout is not None
    assert program.stdout.readline() == "waiting\n"
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=20)
    assert program.returncode == 7
    assert gone(engine) == []


def test_a_forked_child_does_not_take_the_engine_down(gone: Gone) -> None:
    ending = """
import os
child = os.fork()
if child == 0:
    sys.exit(0)  # runs the finalizers that it inherited
os.waitpid(child, 0)
assert len(cluster.generate([make_request([1], ordinal=5)])) == 1
sys.exit(7)
"""
    program, _, engine = run_program(ending)
    program.communicate(timeout=20)
    assert program.returncode == 7
    assert gone(engine) == []


def test_an_engine_that_is_collected_ends(start: Start, gone: Gone) -> None:
    cluster = Cluster("tiny", worker_module="light_worker")
    engine = pids(cluster)
    del cluster
    assert gone(engine) == []


def test_the_user_s_process_dies_during_a_restart(gone: Gone) -> None:
    ending = """
cluster.kill(1)
cluster.kill("coordinator")
while cluster.client.outage is None:
    cluster.client.receive(0.01)
while cluster.client.outage is not None and cluster.client._gone_by is not None:
    cluster.client.receive(0.01)
print(cluster.coordinator_pid, flush=True)
time.sleep(60)
"""
    program, folder, engine = run_program(ending)
    assert program.stdout is not None
    successor = int(program.stdout.readline())
    program.kill()
    program.communicate()
    assert successor not in engine
    assert gone([*engine, successor]) == []
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(folder) in _command(pid)]
    assert not folder.exists()


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
