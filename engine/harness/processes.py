"""The processes of a cluster as the system shows them, and what can be done to one of them from outside. Linux only."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sempre.ipc.process_facts import process_state

# a slow process runs and rests in turns of this length in all
_TURN_S = 0.05


def command_line(pid: int) -> list[str]:
    """The words of a running process's command; empty if there is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return words.decode(errors="replace").split("\0")[:-1] if is_running(pid) else []


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that only waits for its parent to read its exit code."""
    return process_state(pid) not in ("", "ended")


def workers_of(directory: Path) -> dict[int, int]:
    """The processes of the workers that connect to sockets in this folder: process id to rank."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        words = command_line(pid)
        if "--connect" in words and "--rank" in words and f"{directory}/" in words[words.index("--connect") + 1]:
            found[pid] = int(words[words.index("--rank") + 1])
    return found


def stop_for(pid: int, wait: Callable[[float], object], seconds: float) -> None:
    """SIGSTOP, SIGCONT. `wait` may return early."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        try:
            wait(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)


def slow_down(pid: int, wait: Callable[[float], object], seconds: float, share: float) -> None:
    """Let it run for `share` of the time, in short turns, as a process does before a slow disk or on a crowded
    machine."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and is_running(pid):
        stop_for(pid, wait, _TURN_S * (1 - share))
        if wait(_TURN_S * share):
            return


@contextmanager
def without_more_memory(pid: int) -> Iterator[None]:
    """While the context lasts, the process gets no more address space than it has: further allocations fail."""
    pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[0])
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, before)
