"""What a process can tell of itself, and what the system tells of another: memory, state, where a thread is."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path

# a deep stack must not make a heartbeat large
_MOST_FRAMES = 60
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "ended",
    "X": "ended",
}


def resident_bytes() -> int | None:
    """The memory of this process that is in RAM; None where the system does not tell (it is read from /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def process_state(pid: int) -> str:
    """What the process of this host does, in words; empty where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # the name before it may have spaces and parentheses
    letter = status.rpartition(")")[2].split()[0]
    return _STATES.get(letter, "")


def main_thread_stack() -> str:
    """Where the main thread of this process is, the outermost call first. Needs the interpreter's lock: it cannot be
    told of a thread that holds it for long."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    frames = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_MOST_FRAMES)
    frames.reverse()
    return "".join(frames.format()).rstrip()
