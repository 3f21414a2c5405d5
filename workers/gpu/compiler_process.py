"""The process that fills Triton's cache folder: see `compiler_main`. Imports no torch.

It takes seconds to start, so it may be started before it is known what to compile.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from contextlib import suppress

from sempre.ipc.liveness import bound

logger = logging.getLogger(__name__)

MOST_PROCESSES = 32
_TAIL = 2000
# all descriptions; only root may have more
_PIPE_BYTES = 1 << 20


class CompilerProcess:
    """Ends with the thread that started it at the latest, even during its imports."""

    def __init__(self, *, launchers: bool = True) -> None:
        # one core is left for this process, which loads weights in the meantime
        processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1))
        command = [sys.executable, "-P", "-m", "sempre.workers.gpu.compiler_main", "--processes", str(processes)]
        self._popen = subprocess.Popen(
            bound([*command, *(["--launchers"] if launchers else [])]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # forking needs a process without threads
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._popen.stdin is not None
        # so that `add` does not block while the process is starting; a smaller pipe works too
        with suppress(OSError):
            fcntl.fcntl(self._popen.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def start(self, architecture: int) -> None:
        """Name the target: 90 for compute capability 9.0. Called first, and once."""
        self._send(str(architecture))

    def add(self, description: str) -> None:
        """Queue a variant for compilation, without waiting."""
        self._send(description)

    def finish(self) -> bool:
        """Wait for all. False, with a warning, when that failed: loading a missing one then compiles it, or raises its
        error."""
        _, errors = self._popen.communicate()
        code = self._popen.returncode
        if code != 0:
            logger.warning("kernels are compiled one at a time: the compiler ended with %d: %s", code, errors[-_TAIL:])
        return code == 0

    def close(self) -> None:
        """End it when it is not, or no longer, needed."""
        if self._popen.returncode is None:
            self._popen.kill()
            self._popen.communicate()

    def _send(self, line: str) -> None:
        assert self._popen.stdin is not None
        # if it has ended, `finish` reports why
        with suppress(BrokenPipeError):
            print(line, file=self._popen.stdin, flush=True)
