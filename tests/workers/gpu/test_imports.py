"""A worker on a GPU starts without what only the CPU's kernels need."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# seconds of every start
COSTLY = ("numba", "llvmlite", "scipy", "transformers", "sympy", "torch._dynamo")
PROGRAM = (
    "import sys; import sempre.workers.worker; {modules};"
    f" print([name for name in {COSTLY!r} if name in sys.modules])"
)


@pytest.mark.parametrize(
    ("modules", "imported"),
    [("import sempre.workers.gpu.backend", []), ("import sempre.kernels.linear.cpu", ["numba", "llvmlite", "scipy"])],
)
def test_costly_modules_of_a_worker(modules: str, imported: list[str]) -> None:
    program = PROGRAM.format(modules=modules)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == repr(imported)
