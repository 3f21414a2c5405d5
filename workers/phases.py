"""How long the phases of a start take, and for how long of that kernels were compiled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

COMPILED = "compile_kernels"
"""beside the phases; it is part of them"""


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Set the time of a phase, and add to `seconds[COMPILED]` what the CPU's kernels took to compile meanwhile."""
    began, compiled = time.monotonic(), _compile_seconds()
    yield
    seconds[phase] = time.monotonic() - began
    seconds[COMPILED] = seconds.get(COMPILED, 0.0) + _compile_seconds() - compiled


def _compile_seconds() -> float:
    # a GPU's worker does without numba
    jit = sys.modules.get("sempre.kernels.jit")
    return 0.0 if jit is None else float(jit.compile_seconds())
