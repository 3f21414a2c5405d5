"""The GPU kernels in Triton's interpreter, where there is no GPU (with one, tests/gpu runs them compiled).

The interpreter is chosen when Triton is imported, so tests/conftest.py does it. It rounds bfloat16 otherwise than a
GPU, so float16 stands for it.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu runs the compiled kernels")
