"""The process that fills Triton's cache folder: see `compiler_main`. Imports no torch.

It takes seconds to start, which may happen before it is known what there is to compile.
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
# all descriptions; more than that only root may have
_PIPE_BYTES = 1 << 20


class CompilerProcess:
    """Ends with the thread that started it, if not before; also while it still imports what it needs."""

    def __init__(self, *, launchers: bool = True) -> None:
        # a core is left to this process, which loads weights meanwhile
        processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1))
        command = [sys.executable, "-P", "-m", "sempre.workers.gpu.compiler_main", "--processes", str(processes)]
        self._popen = subprocess.Popen(
            bound([*command, *(["--launchers"] if launchers else [])]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # forks want a process without threads
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._popen.stdin is not None
        # so that `add` does not wait while the process is still starting; a smaller pipe does as well
        with suppress(OSError):
            fcntl.fcntl(self._popen.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def start(self, architecture: int) -> None:
        """Say what is compiled for: 90 for compute capability 9.0. First, and once."""
        self._send(str(architecture))

    def add(self, description: str) -> None:
        """Have a variant compiled, without waiting."""
        self._send(description)

    def finish(self) -> bool:
        """Wait for all. False, with a warning, when that failed: who loads one that is missing compiles it then, or
        meets its error."""
        _, errors = self._popen.communicate()
        code = self._popen.returncode
        if code != 0:
            logger.warning("kernels are compiled one at a time: the compiler ended with %d: %s", code, errors[-_TAIL:])
        return code == 0

    def close(self) -> None:
        """It is not needed, or no longer."""
        if self._popen.returncode is None:
            self._popen.kill()
            self._popen.communicate()

    def _send(self, line: str) -> None:
        assert self._popen.stdin is not None
        # one that has ended says why to `finish`
        with suppress(BrokenPipeError):
            print(line, file=self._popen.stdin, flush=True)
