"""A child process started as `python -m module`, with its log and a file descriptor that signals its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import sempre

_LOG_TAIL_BYTES = 8192


class ChildProcess:
    """Owns one process; stdout and stderr go to `log_path`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str],
        stdin: bytes = b"",
        own_group: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.log_path = log_path
        with open(log_path, "wb", buffering=0) as log:
            # -P: a file in the current folder must not shadow a module
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                process_group=0 if own_group else None,
                pass_fds=pass_fds,
            )
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else None
        if self._popen.stdin is not None:
            self._feed(stdin)

    def _feed(self, stdin: bytes) -> None:
        assert self._popen.stdin is not None
        try:
            with self._popen.stdin as pipe:
                pipe.write(stdin)
        except BrokenPipeError:
            # it has already ended; its exit code says why
            return

    def fileno(self) -> int | None:
        """A descriptor that is readable once the process has ended; None if the system does not offer one."""
        return self._pidfd

    def exitcode(self) -> int | None:
        """None while it runs; a negative number is the signal that ended it."""
        return self._popen.poll()

    def ended(self) -> bool:
        """Whether it has ended; unlike `exitcode`, this keeps the zombie and so its process id."""
        if self._popen.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True  # this process ignores SIGCHLD, or other code has waited

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None if it still runs after `timeout_s`."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def send_kill(self) -> None:
        """Send SIGKILL without waiting for the end."""
        self._popen.kill()

    def kill(self) -> None:
        """Send SIGKILL, which also ends a stopped process; return when it is gone."""
        self._popen.kill()
        self._popen.wait()

    def kill_group(self) -> None:
        """Send SIGKILL to the process and all its children; needs `own_group`."""
        if self._popen.returncode is None:
            # not yet waited for, so no other process can have this id
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def ask_for_stacks(self) -> None:
        """Have the process write the stacks of its threads to its log. It must handle SIGUSR1, by `faulthandler`; one
        that is stopped does so when it is continued."""
        if not self.ended():
            self._popen.send_signal(signal.SIGUSR1)

    def log_size(self) -> int:
        """Bytes that it has logged so far."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log_tail(self, start: int = 0) -> str:
        """The last lines of its log, those from byte `start` on."""
        try:
            data = self.log_path.read_bytes()[start:]
        except FileNotFoundError:
            return ""
        return data[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()

    def describe_exit(self) -> str:
        code = self.exitcode()
        if code is None:
            return "still running"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"


def child_environment() -> dict[str, str]:
    """This process's environment, with the folder that `sempre` was imported from on PYTHONPATH."""
    environment = dict(os.environ)
    site_folders = {entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
    known = environment.get("PYTHONPATH", "").split(os.pathsep)
    roots = [str(Path(folder).parent) for folder in sempre.__path__]
    extra = [root for root in roots if root in sys.path and root not in site_folders and root not in known]
    if extra:
        environment["PYTHONPATH"] = os.pathsep.join([*extra, *filter(None, known)])
    return environment


class RestartBudget:
    """At most `max_restarts` in any `window_s` seconds."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Whether one more restart is allowed now; if so, count it."""
        now = time.monotonic()
        while self._times and now - self._times[0] > self._window_s:
            self._times.popleft()
        if len(self._times) >= self._max_restarts:
            return False
        self._times.append(now)
        return True

    def forgive(self, count: int) -> None:
        """Uncount the last `count` restarts: their cause is known and gone."""
        for _ in range(min(count, len(self._times))):
            self._times.pop()

    def exhausted(self) -> str:
        """Why no restart is allowed, in words."""
        if not self._max_restarts:
            return "it is not restarted (max_restarts=0)"
        return (
            f"it was restarted {len(self._times)} times within {self._window_s:g} s "
            f"(max_restarts={self._max_restarts}) and is given up"
        )
