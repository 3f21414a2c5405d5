"""Kernels compiled in advance, in another process and without a GPU, are the ones that a launch needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("triton")

# two variants of a kernel for an H100, as a worker would request them
PROGRAM = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from sempre.workers.gpu.compiler_main import TargetOnly
driver.set_active(TargetOnly(GPUTarget("cuda", 90, 32)))
from sempre.kernels.gpu_jit import CHAINS, collecting, compile_described
from sempre.kernels.norms import gpu
from sempre.workers.gpu.compiler_process import CompilerProcess
assert CHAINS.value
found = []
def collect():
    with collecting(found.append) as collection:
        for _ in range(2):
            for width in (64, 128):
                x = torch.zeros(2, width, dtype=torch.bfloat16)
                gpu.rms_norm(x, x[0], 1e-6, x)
    return collection
variants = collect().variants
assert variants == found and len(found) == 2
for lines in (['["json", "none", ""]'], [variant.describe() for variant in variants]):
    compiler = CompilerProcess(launchers=False)
    compiler.start(90)
    for line in lines:
        compiler.add(line)
    print(json.dumps([compiler.finish(), *(variant.is_on_disk() for variant in variants)]))
compile_described(variants[0].describe(), launcher=False)
print(json.dumps([collect().variants == variants[1:], collect().complete]))
"""

WORKER = """
import time
from sempre.workers.gpu.compiler_process import CompilerProcess
compiler = CompilerProcess()
compiler.start(90)
compiler.add("nothing that can be compiled")
print(compiler._popen.pid, flush=True)
time.sleep(60)
"""


def test_what_is_compiled_ahead_is_found_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # the first attempt names a kernel that does not exist; this process ends up with one of two variants
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [[False, False, False], [True, True, True], [True, False]]
    assert "kernels are compiled one at a time" in done.stderr
    assert "AttributeError" in done.stderr


def test_it_does_not_outlive_its_worker() -> None:
    """Nor while it imports what it needs, and not when it is stopped."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    compiler = psutil.Process(int(worker.stdout.readline()))
    deadline = time.monotonic() + 20
    # it binds itself first; while a program is being replaced there are no words
    while not (words := compiler.cmdline()) or any(word.endswith("liveness.py") for word in words):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    compiler.suspend()
    worker.kill()
    worker.communicate()
    assert not psutil.wait_procs([compiler], timeout=5)[1]
