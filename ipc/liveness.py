"""How a process of ours lives, and notices that its parent is gone: no process of an engine outlives the user's.

`python liveness.py PID COMMAND …` is the command that `bound` builds; for its sake this file imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

PARENT_POLL_S = 0.25
# time for the parent to shut down cleanly after its own parent has ended
_ORDERLY_END_S = 1.5
_PR_SET_PDEATHSIG = 1
# a watcher that paused for longer was stopped or busy itself; that time is not counted as another's silence
LONGEST_PAUSE_S = 1.0
# a starting process may be silent for longer than a serving one: it imports, and reads from disks
_STARTING_FACTOR = 4.0
_STARTING_LEAST_S = 20.0
_COLLECT_AFTER = 20_000


def collect_garbage_rarely() -> None:
    """For a process that is ours alone: a step makes thousands of objects, which end without the collector, and by
    default it would look through them several times in each step."""
    gc.set_threshold(_COLLECT_AFTER, 20, 20)


def starting_timeout_s(timeout_s: float) -> float:
    """The silence after which a starting process counts as stuck; for a serving one it is `timeout_s`."""
    return max(_STARTING_LEAST_S, _STARTING_FACTOR * timeout_s)


def die_with_parent_thread(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends; also works while it is stopped.

    With `parent_pid` the process ends at once if that parent is gone already: call this before anything slow. Only
    Linux has this; elsewhere `watch_parent` alone does the work.
    """
    _at_parent_thread_s_end(signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os.write(2, b"the process that started this one is gone\n")
        os._exit(1)


def wake_up_with_parent_thread() -> None:
    """Have the kernel continue this process, should it be stopped, when the thread that started it ends.

    For a process that still has work to do when its parent dies (see `watch_parent`). Any thread may have started it:
    one that ends earlier does no harm. Only Linux has this.
    """
    _at_parent_thread_s_end(signal.SIGCONT)


def bound(command: Sequence[str]) -> list[str]:
    """`command`, a program and its arguments, wrapped so that it ends with the thread that starts it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _at_parent_thread_s_end(number: signal.Signals) -> None:
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")


def leave_terminal_signals_to_parent() -> None:
    """An interrupt or the end of the terminal is for the user's process to handle; the engine ends with it.

    The kernel also sends SIGHUP to a group that has lost its parent while one of its members is stopped.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def watch_parent(parent_pid: int, on_orphaned: Callable[[], None]) -> None:
    """Call `on_orphaned` from a daemon thread, then exit the process, once its parent is no longer `parent_pid`."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
        try:
            on_orphaned()
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def watch_grandparent(grandparent_pid: int, parent_pid: int) -> None:
    """From a daemon thread, wake the parent, which may be stopped, when the grandparent is gone; kill it if it stays.

    Needs process descriptors (Linux 5.3); without them the parent's own watch has to do.
    """
    if not hasattr(os, "pidfd_open"):
        return
    try:
        descriptor = os.pidfd_open(grandparent_pid)
    except ProcessLookupError:
        descriptor = None

    def watch() -> None:
        if descriptor is not None:
            select.select([descriptor], [], [])
        if os.getppid() == parent_pid:
            os.kill(parent_pid, signal.SIGCONT)
        time.sleep(_ORDERLY_END_S)
        if os.getppid() == parent_pid:
            os.kill(parent_pid, signal.SIGKILL)

    threading.Thread(target=watch, name="grandparent-watch", daemon=True).start()


if __name__ == "__main__":
    die_with_parent_thread(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
