"""How a process notices that its parent is gone: no process of an engine outlives the user's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PARENT_POLL_S = 0.25
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


def watch_parent(parent_pid: int, on_orphaned: Callable[[], None]) -> threading.Thread:
    """Call `on_orphaned` from a daemon thread, then exit the process, once its parent is no longer `parent_pid`."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
        try:
            on_orphaned()
        finally:
            os._exit(1)

    thread = threading.Thread(target=watch, name="parent-watch", daemon=True)
    thread.start()
    return thread
