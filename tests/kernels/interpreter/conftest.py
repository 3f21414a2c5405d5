"""The GPU kernels in Triton's interpreter, where there is no GPU (with one, tests/gpu runs them compiled).

The interpreter is chosen when Triton is imported, so tests/conftest.py does it. It rounds bfloat16 differently from a
GPU, so float16 is used instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu runs the compiled kernels")


@pytest.fixture(scope="package", autouse=True)
def _language_replaced_once() -> Iterator[None]:
    """The interpreter patches the language's modules again at every call of a kernel function, which takes most of its
    time; patching once for these tests is equivalent."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    replace, scopes = interpreter._patch_lang, {}

    def replace_once(function: Any) -> Any:
        # it looks for the language in a function's globals, which are those of its module
        if function.__module__ not in scopes:
            scopes[function.__module__] = replace(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once
    yield
    interpreter._patch_lang = replace
    for scope in reversed(scopes.values()):
        scope.restore()
