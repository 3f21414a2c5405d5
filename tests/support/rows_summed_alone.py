"""Triton's interpreter with matrices multiplied row by row.

It uses a library whose sums depend on the number of rows, which the tensor cores of a GPU do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def sum_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a product has the same bits beside any others."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, most: Any) -> Any:
        right = b.data.astype(d.data.dtype)
        rows = [row @ right for row in a.data.astype(d.data.dtype)]
        return interpreter.TensorHandle(np.stack(rows) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
