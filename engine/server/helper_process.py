"""`python -m sempre.engine.server.helper_process`: work on what strangers sent, with limits of time and memory.

Frames on stdin and stdout: four bytes of length, then msgpack. A task is [name, arguments]; the answer is
[True, result] or [False, [kind of error, message, parameter]]. It ends with its stdin. `--nice` leaves processors to
others.
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

MAX_MEMORY_BYTES = 96 * 2**20
"""What a task may take beyond what the process has once it is ready."""
MAX_CPU_S = 2
"""Seconds of processor time of one task."""
_NICENESS = 10

TASKS: dict[str, Callable[..., Any]] = {"render_chat": render_chat}


def answer(task: bytes) -> list[Any]:
    """Do one task. Raises nothing that the task is to blame for."""
    try:
        name, arguments = msgspec.msgpack.decode(task)
        return [True, TASKS[name](**arguments)]
    except (ConfigError, RequestError) as error:
        return [False, [type(error).__name__, str(error), error.parameter]]
    except MemoryError:
        return [False, ["MemoryError", "", None]]
    # an expression of a template may do whatever raises; the task is then the one to blame
    except Exception as error:
        return [False, ["RequestError", f"chat_template failed: {type(error).__name__}: {error}"[:1000], "messages"]]


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
            told = msgspec.msgpack.encode(answer(task))
        except MemoryError:
            told = msgspec.msgpack.encode([False, ["MemoryError", "", None]])
        sink.write(len(told).to_bytes(4, "little") + told)
        sink.flush()


def main() -> None:
    """Serve until stdin ends."""
    die_with_parent_thread()
    leave_terminal_signals_to_parent()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not stand among the frames
    if "--nice" in sys.argv[1:]:
        with suppress(OSError):
            os.nice(_NICENESS)
    msgspec.msgpack.encode(answer(msgspec.msgpack.encode(["render_chat", _WARM_UP])))
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
