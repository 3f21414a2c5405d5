"""The process that compiles kernels ends with the worker that started it, from its first moment on."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

WORKER = """
import time
from sempre.workers.gpu.compiler_process import CompilerProcess
compiler = CompilerProcess()
compiler.start(90)
compiler.add("nothing that can be compiled")
print(compiler._popen.pid, flush=True)
time.sleep(60)
"""


def test_it_does_not_outlive_its_worker() -> None:
    """Nor while it imports what it needs, and not when it is stopped."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    compiler = psutil.Process(int(worker.stdout.readline()))
    deadline = time.monotonic() + 20
    while any(word.endswith("liveness.py") for word in compiler.cmdline()):  # it binds itself first
        assert time.monotonic() < deadline
        time.sleep(0.01)
    compiler.suspend()
    worker.kill()
    worker.communicate()
    assert not psutil.wait_procs([compiler], timeout=5)[1]
