"""`python -m sempre.engine.server.helper_process`: handles untrusted input with limits of time and memory.

Frames on stdin and stdout: four bytes of length, then JSON, whose integers have any size. A task is [name, arguments];
the answer is [True, result] or [False, [kind of error, message, parameter]]. It ends with its stdin. `--nice` lowers
its priority.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from sempre.engine.text.chat_template import render_chat
from sempre.ipc.errors import ConfigError, RequestError
from sempre.ipc.liveness import die_with_parent_thread, leave_terminal_signals_to_parent

MAX_MEMORY_BYTES = 56 * 2**20
"""Memory that a task may use in addition to that of the ready process."""
MAX_CPU_S = 2
"""Seconds of CPU time for one task."""
_NICENESS = 10

TASKS: dict[str, Callable[..., Any]] = {"render_chat": render_chat}


def answer(task: bytes) -> list[Any]:
    """Run one task. Never raises an error that the task caused."""
    try:
        name, arguments = msgspec.json.decode(task)
        return [True, TASKS[name](**arguments)]
    except (ConfigError, RequestError) as error:
        return [False, [type(error).__name__, _sendable(error), error.parameter]]
    except MemoryError:
        return [False, ["MemoryError", "", None]]
    # a template's expression may raise anything; that is the task's error
    except Exception as error:
        told = f"chat_template failed: {type(error).__name__}: {_sendable(error)}"
        return [False, ["RequestError", told[:1000], "messages"]]


def _sendable(error: Exception) -> str:
    """What an error says: a template may put any text into it."""
    return str(error).encode("utf-8", "backslashreplace").decode()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_time() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + MAX_CPU_S + 1, resource.RLIM_INFINITY))


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    while len(head := source.read(4)) == 4:
        task = source.read(int.from_bytes(head, "little"))
        _limit_time()
        try:
            told = msgspec.json.encode(answer(task))
        except MemoryError:
            told = msgspec.json.encode([False, ["MemoryError", "", None]])
        sink.write(len(told).to_bytes(4, "little") + told)
        sink.flush()


def main() -> None:
    """Serve until stdin ends."""
    die_with_parent_thread()
    leave_terminal_signals_to_parent()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints must not end up between the frames
    if "--nice" in sys.argv[1:]:
        with suppress(OSError):
            os.nice(_NICENESS)
    msgspec.json.encode(answer(msgspec.json.encode(["render_chat", _WARM_UP])))
    _limit_memory()
    _serve(sys.stdin.buffer, sink)


_WARM_UP = {
    "messages": [{"role": "user", "content": "Hi"}],
    "template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "bos_token": None,
    "eos_token": None,
}

if __name__ == "__main__":
    main()
