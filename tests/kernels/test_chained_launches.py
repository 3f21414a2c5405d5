"""Kernels that may start before the previous one has ended: each waits for it, in every program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def _functions(folder: Path) -> dict[str, list[ast.FunctionDef]]:
    found: dict[str, list[ast.FunctionDef]] = {}
    for path in sorted(folder.rglob("gpu*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(node)
    return found


def _launched_chained(folder: Path) -> set[str]:
    """Names of the kernels launched with `**CHAINED`."""
    names = set()
    for path in sorted(folder.rglob("gpu*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Subscript):
                continue
            if any(keyword.arg is None and ast.unparse(keyword.value) == "CHAINED" for keyword in node.keywords):
                kernel = node.func.value
                names.add(kernel.attr if isinstance(kernel, ast.Attribute) else ast.unparse(kernel))
    return names


def _always_waits(body: list[ast.stmt]) -> bool:
    """Whether every way through `body` reaches `wait_for_previous` before it returns or ends."""
    for statement in body:
        if isinstance(statement, ast.Expr) and ast.unparse(statement.value) == "wait_for_previous()":
            return True
        if isinstance(statement, ast.If) and _always_waits(statement.body) and _always_waits(statement.orelse):
            return True
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            return False
    return False


def test_every_chained_kernel_waits() -> None:
    functions = _functions(KERNELS)
    names = _launched_chained(KERNELS)
    assert {"_linear", "_attend", "_add_rms_norm", "_rope"} <= names
    for name in names:
        (kernel,) = functions[name]
        assert _always_waits(kernel.body), f"{name}: a way through it never waits for the kernel before"


@pytest.mark.parametrize(
    ("source", "waits"),
    [
        ("wait_for_previous()\nx = 1", True),
        ("if a:\n    wait_for_previous()\nelse:\n    wait_for_previous()", True),
        ("if a:\n    wait_for_previous()", False),
        ("if a:\n    return\nwait_for_previous()", False),
        ("x = 1", False),
    ],
)
def test_control(source: str, waits: bool) -> None:
    (function,) = ast.parse("def f():\n" + "\n".join(f"    {line}" for line in source.splitlines())).body
    assert isinstance(function, ast.FunctionDef)
    assert _always_waits(function.body) is waits
