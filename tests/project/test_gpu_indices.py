"""On a GPU only kernels index by what kernels have written.

A worker collects its kernels by running the model without launching them, so what they would have written is anything;
PyTorch's own indexing then stops the device.
"""

from __future__ import annotations

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
INDEXING = {"index_select", "gather", "take", "index_copy_", "index_add_", "scatter_", "index_put_", "take_along_dim"}


def _indexing(source: str) -> set[str]:
    """Names of tensor operations that index by a tensor."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {func.attr for func in calls if isinstance(func, ast.Attribute) and not _is_triton(func)} & INDEXING


def _is_triton(func: ast.Attribute) -> bool:
    return isinstance(func.value, ast.Name) and func.value.id == "tl"


def test_gpu_facades_index_by_no_tensor() -> None:
    files = sorted(KERNELS.glob("*/gpu*.py"))
    assert len(files) > 15
    found = {file: names for file in files if (names := _indexing(file.read_text(encoding="utf-8")))}
    assert not found


def test_an_indexing_call_is_noticed() -> None:
    assert _indexing("def f(x, i):\n    return x.index_select(0, i)") == {"index_select"}
    assert not _indexing("def f(x, i):\n    return tl.gather(x, i, 0)")
