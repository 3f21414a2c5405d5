"""Every tensor the project creates names its dtype and device: the user's defaults are not the engine's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ipc", "kernels", "workers", "engine")
FACTORIES = frozenset(
    [
        "Tensor",
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "zeros",
    ]
)
DEFAULTS = frozenset(["get_default_device", "get_default_dtype", "set_default_device", "set_default_dtype"])


def faults(source: str) -> Iterator[str]:
    """Calls `torch.empty(…)` and the like without dtype or device, and uses of torch's defaults."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"):
            continue
        if node.attr in DEFAULTS:
            yield f"line {node.lineno}: torch.{node.attr}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (name := _torch_function(node.func)) in FACTORIES:
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            if missing:
                yield f"line {node.lineno}: torch.{name} without {' and '.join(sorted(missing))}"


def _torch_function(function: ast.expr) -> str | None:
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "torch":
        return function.attr
    return None


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_dtype_and_device_are_named() -> None:
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in modules()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("call", ["torch.empty(3)", "torch.tensor(x, dtype=d)", "f(torch.arange(4, device=c))"])
def test_control_a_bare_call_is_found(call: str) -> None:
    assert len(list(faults(call))) == 1
    assert list(faults(call.replace("torch.", "np."))) == []
