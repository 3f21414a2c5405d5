"""A client that is stopped: its outputs wait in bounded memory, and it goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from wide_worker import ROW_BYTES

from sempre.engine.coordinator.process import MOST_UNREAD_BYTES

NUM_TOKENS = 220
# what a process may take besides the frames that wait: those of steps in flight, each packed and unpacked
SLACK_BYTES = 48 * 2**20
PROGRAM = Path(__file__).with_name("stopped_client.py")


class Client:
    """A client that has begun, and stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self.coordinator = psutil.Process(int(process.stdout.readline()))
        self.before = self.coordinator.memory_info().rss
        process.stdin.write("\n")
        process.stdin.flush()

    def growth(self) -> int:
        """Wait until the coordinator's memory has grown and no longer does; return by how many bytes."""
        sizes = [0]
        while max(sizes) < MOST_UNREAD_BYTES / 2 or max(sizes[-10:]) > max(sizes[:-9], default=0):
            time.sleep(0.1)
            sizes.append(self.coordinator.memory_info().rss - self.before)
        return max(sizes)

    def result(self) -> str:
        """What it has received when it is done."""
        assert self.process.stdout is not None
        told = self.process.stdout.read()
        assert self.process.wait() == 0
        return told


@contextmanager
def client() -> Iterator[Client]:
    with subprocess.Popen(
        [sys.executable, PROGRAM, str(NUM_TOKENS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Client(process)
        finally:
            process.kill()


def test_its_outputs_wait_in_bounded_memory_and_it_goes_on() -> None:
    assert NUM_TOKENS * ROW_BYTES > MOST_UNREAD_BYTES + 2 * SLACK_BYTES  # the control: all of them would not fit
    results = []
    for is_watched in (True, False):
        with client() as stopped:
            if is_watched:
                assert stopped.growth() < MOST_UNREAD_BYTES + SLACK_BYTES
            else:
                os.waitid(os.P_PID, stopped.process.pid, os.WSTOPPED | os.WNOWAIT)
            stopped.process.send_signal(signal.SIGCONT)
            results.append(stopped.result())
    assert results[0] == results[1]
    assert results[0].split()[0] == str(NUM_TOKENS)


def test_a_stopped_client_that_is_killed_leaves_nothing(gone: Callable[[Iterable[int]], list[int]]) -> None:
    with client() as stopped:
        stopped.growth()
        pids = [stopped.coordinator.pid, *(child.pid for child in stopped.coordinator.children())]
        stopped.process.kill()
        stopped.process.wait()
        assert gone(pids) == []
