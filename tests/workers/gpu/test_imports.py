"""A worker on a GPU starts without what only the CPU's kernels need."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# seconds of every start
COSTLY = ("numba", "llvmlite", "scipy", "transformers", "sympy", "torch._dynamo")
PROGRAM = f"""
import sys
import sempre.workers.worker, sempre.workers.gpu.backend
print([name for name in {COSTLY} if name in sys.modules])
import sempre.kernels.linear.cpu
print([name for name in {COSTLY} if name in sys.modules])
"""


def test_costly_modules_of_a_worker() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["[]", "['numba', 'llvmlite', 'scipy']"]
