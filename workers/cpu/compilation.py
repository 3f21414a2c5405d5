"""Compiles the sampler's kernels in a process of their own, at the first start on a machine.

It fills the cache folder while this process loads the weights and compiles the kernels of the model, which takes about
as long: LLVM compiles with one thread of a process at a time.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Self

from sempre.ipc.liveness import bound
from sempre.kernels.jit import counted_as_compilation, is_kept
from sempre.kernels.sampling.cpu import KERNELS
from sempre.kernels.sampling.warm_up import PROGRAM

logger = logging.getLogger(__name__)

_TAIL = 2000


class SamplingCompilation:
    """Ends with the thread that started it at the latest."""

    @classmethod
    def start(cls) -> Self | None:
        """None where nothing is gained: with one core, with the kernels in the cache, or without a cache."""
        if len(os.sched_getaffinity(0)) == 1 or all(is_kept(kernel) for kernel in KERNELS):
            return None
        return cls()

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            bound([sys.executable, "-P", "-m", PROGRAM]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        )

    def finish(self) -> None:
        """Wait for it. What it failed to compile is compiled when it is first used."""
        with counted_as_compilation():
            _, errors = self._popen.communicate()
        if code := self._popen.returncode:
            logger.warning(
                "the sampler's kernels' compiler ended with %d, so they are compiled here: %s", code, errors[-_TAIL:]
            )

    def close(self) -> None:
        """End it if it has not ended."""
        if self._popen.returncode is None:
            self._popen.kill()
            self._popen.communicate()
