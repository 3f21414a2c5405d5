"""A worker process on another host, as far as the agent there has told."""

from __future__ import annotations

from typing import Protocol

from sempre.ipc.messages import StartWorker, WorkerExited


class WorkerProcess(Protocol):
    """What the executor needs of a worker's process, wherever it runs; `child_process.ChildProcess` is one."""

    pid: int
    """0: not known yet"""

    def fileno(self) -> int | None: ...

    def exitcode(self) -> int | None: ...

    def wait(self, timeout_s: float) -> int | None: ...

    def send_kill(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...

    def log_size(self) -> int: ...

    def log_tail(self, start: int = 0) -> str: ...

    def ask_for_stacks(self) -> None: ...

    def describe_exit(self) -> str: ...


class NodeLink(Protocol):
    """How a process is reached."""

    def kill(self, node: int, command: StartWorker) -> bool:
        """Ask for its end; whether the host could be told."""

    def read(self, wait_s: float = 0.0) -> None:
        """Take in what hosts have told, after waiting for up to `wait_s`."""


# how long an agent may take to kill a process
_GONE_S = 10.0
_LOOK_S = 0.05


class RemoteProcess:
    """`WorkerProcess`: started by `command` on a node."""

    def __init__(self, link: NodeLink, node: int, command: StartWorker) -> None:
        self.node = node
        self.command = command
        self.pid = 0
        self.end: WorkerExited | None = None
        self._link = link

    def fileno(self) -> int | None:
        """None: its end is told by a message."""
        return None

    def exitcode(self) -> int | None:
        if self.end is None:
            return None
        return 1 if self.end.exitcode is None else self.end.exitcode

    def wait(self, timeout_s: float) -> int | None:
        for _ in range(max(1, round(timeout_s / _LOOK_S))):
            if self.end is not None:
                break
            self._link.read(min(_LOOK_S, timeout_s))
        return self.exitcode()

    def send_kill(self) -> None:
        """Nothing: any thread may call this when the process ends, which the agent notices by itself."""

    def kill(self) -> None:
        """Return when it is gone, or cannot be reached, when its agent ends it."""
        if self.end is None and self._link.kill(self.node, self.command):
            self.wait(_GONE_S)
        if self.end is None:
            self.lose("killed")

    def lose(self, ending: str) -> None:
        """It counts as gone."""
        self.end = WorkerExited(rank=self.command.rank, start=self.command.start, ending=ending)

    def close(self) -> None:
        """Nothing is held."""

    def log_size(self) -> int:
        """Its log is on its host."""
        return 0

    def log_tail(self, start: int = 0) -> str:
        return "" if self.end is None else self.end.log_tail

    def ask_for_stacks(self) -> None:
        """Nothing: they would be in its log, on its host."""

    def describe_exit(self) -> str:
        return "still running" if self.end is None else self.end.ending
