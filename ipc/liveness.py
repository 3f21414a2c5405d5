"""How a process notices that it is on its own: no process of an engine outlives the user's."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

PARENT_POLL_S = 0.25
# what the parent is left with to end in order after its own parent did
_ORDERLY_END_S = 1.5
_PR_SET_PDEATHSIG = 1


def die_with_parent_thread() -> None:
    """Have the kernel kill this process when the thread that started it ends; also works while it is stopped.

    Only Linux has this; elsewhere `watch_parent` alone does the work.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")


def leave_terminal_signals_to_parent() -> None:
    """An interrupt or the end of the terminal is for the user's process to handle; the engine ends with that one.

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
    """Kill the parent from a daemon thread when it stays on although the grandparent is gone: it may be stopped.

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
        time.sleep(_ORDERLY_END_S)
        if os.getppid() == parent_pid:
            os.kill(parent_pid, signal.SIGKILL)

    threading.Thread(target=watch, name="grandparent-watch", daemon=True).start()
