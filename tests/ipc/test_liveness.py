"""Each way a process notices that its parent is gone, alone: in an engine they back each other up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from sempre.ipc import liveness

GONE_WITHIN_S = 5.0

CHILD = """
import os, time
from sempre.ipc import liveness
{arm}
print("armed", os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
time.sleep(60)
"""
BINDING_PARENT = """
import subprocess, sys, time
from sempre.ipc.liveness import bound
child = subprocess.Popen(bound([sys.executable, "-c", sys.argv[1]]), start_new_session=True)
time.sleep(60)
"""
# nobody is woken up by the kernel when the parent of a session's leader dies
SESSION_PARENT = PARENT.replace("*sys.argv[2:]])", "*sys.argv[2:]], start_new_session=True)")
GRANDPARENT = """
import os, subprocess, sys, time
parent = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], str(os.getpid())])
time.sleep(60)
"""


class Family:
    """The oldest of some processes, and the process id that the youngest of them prints once it is armed."""

    def __init__(self, *programs: str) -> None:
        self.oldest = subprocess.Popen([sys.executable, "-c", *programs], stdout=subprocess.PIPE, text=True)
        assert self.oldest.stdout is not None
        word, pid = self.oldest.stdout.readline().split()
        assert word == "armed"
        self.youngest = psutil.Process(int(pid))
        oldest = psutil.Process(self.oldest.pid)
        self.members = [oldest, *oldest.children(recursive=True)]

    def rest_of_output(self) -> str:
        """What the youngest says before it ends, which closes the pipe."""
        assert self.oldest.stdout is not None
        return self.oldest.stdout.read()

    def end(self) -> None:
        for process in self.members:
            if process.is_running():
                process.kill()
        self.oldest.communicate()


@pytest.fixture
def families() -> Iterator[list[Family]]:
    started: list[Family] = []
    yield started
    for family in started:
        family.end()


def is_gone(process: psutil.Process) -> bool:
    """Within the deadline; one that waits to be reaped is gone."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stopped", [False, True])
def test_the_kernel_ends_a_child_also_while_it_is_stopped(families: list[Family], stopped: bool) -> None:
    family = Family(PARENT, CHILD.format(arm="liveness.die_with_parent_thread()"))
    families.append(family)
    if stopped:
        family.youngest.send_signal(signal.SIGSTOP)
    family.oldest.kill()
    assert is_gone(family.youngest)


def test_an_orphan_does_what_is_left_to_do_and_ends(families: list[Family]) -> None:
    arm = "liveness.watch_parent(os.getppid(), lambda: print('orphaned', flush=True))"
    family = Family(PARENT, CHILD.format(arm=arm))
    families.append(family)
    family.oldest.kill()
    assert family.rest_of_output() == "orphaned\n"
    assert is_gone(family.youngest)


def test_an_orphan_ends_also_when_what_is_left_fails(families: list[Family]) -> None:
    arm = "def fail():\n    raise OSError('disk')\nliveness.watch_parent(os.getppid(), fail)"
    family = Family(PARENT, CHILD.format(arm=arm))
    families.append(family)
    family.oldest.kill()
    assert is_gone(family.youngest)


def test_a_stopped_parent_is_ended_when_the_grandparent_is_gone(families: list[Family]) -> None:
    arm = "import sys\nliveness.watch_grandparent(int(sys.argv[1]), os.getppid())"
    family = Family(GRANDPARENT, PARENT, CHILD.format(arm=arm))
    families.append(family)
    parent = family.members[1]
    parent.send_signal(signal.SIGSTOP)
    family.oldest.kill()
    assert is_gone(parent)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_command_that_is_bound_ends_with_the_process_that_runs_it(families: list[Family], stopped: bool) -> None:
    family = Family(BINDING_PARENT, CHILD.format(arm=""))
    families.append(family)
    if stopped:
        family.youngest.send_signal(signal.SIGSTOP)
    family.oldest.kill()
    assert is_gone(family.youngest)


def test_a_command_that_is_bound_to_nobody_does_not_run() -> None:
    program = [sys.executable, "-c", "print('it ran')"]
    command = liveness.bound(program)
    assert subprocess.run(command, capture_output=True, text=True).stdout == "it ran\n"
    command[command.index(str(os.getpid()))] = str(os.getppid())
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_stopped_orphan_is_woken_up_for_what_is_left_to_do(families: list[Family]) -> None:
    arm = "liveness.wake_up_with_parent_thread()\n"
    arm += "liveness.watch_parent(os.getppid(), lambda: print('orphaned', flush=True))"
    family = Family(SESSION_PARENT, CHILD.format(arm=arm))
    families.append(family)
    family.youngest.send_signal(signal.SIGSTOP)
    family.oldest.kill()
    assert family.rest_of_output() == "orphaned\n"
    assert is_gone(family.youngest)


def test_terminal_signals_are_left_to_the_parent() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(arm="liveness.leave_terminal_signals_to_parent()")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("armed")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        child.send_signal(number)
    child.communicate(timeout=20)
    assert child.returncode == -signal.SIGTERM
