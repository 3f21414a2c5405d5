"""The house rule of imports: kernels and ipc know nothing of ours, workers know those, the engine knows ipc."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "kernels": {"kernels"},
    "ipc": {"ipc"},
    "workers": {"workers", "kernels", "ipc"},
    "engine": {"engine", "ipc"},
}
# the in-process executor runs a worker
WORKER_SIDE = "engine/executor/"


def _imports(source: str) -> Iterator[str]:
    """The first-level packages of the project that `source` imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names = [node.module] if node.module != "sempre" else [f"sempre.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("sempre."))


def _violations(package: str, relative: str, source: str) -> list[str]:
    allowed = ALLOWED[package] | ({"workers"} if relative.startswith(WORKER_SIDE) else set())
    return [f"{relative} imports sempre.{name}" for name in _imports(source) if name not in allowed]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [v for f in files for v in _violations(package, f.relative_to(ROOT).as_posix(), f.read_text())]
    assert found == []


def test_the_rule_notices_a_violation() -> None:
    assert _violations("kernels", "kernels/x.py", "def f():\n    from sempre.engine import LLM\n")
    assert _violations("engine", "engine/llm.py", "import sempre.workers.worker\n")
    assert not _violations("engine", "engine/executor/x.py", "import sempre.workers.worker\n")


TORCH_FREE = ["sempre.engine", "sempre.engine.coordinator.process", "sempre.engine.cli.main", "sempre.ipc"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_outside_workers(module: str) -> None:
    """Importing the front end, the coordinator or the CLI loads neither torch nor numba."""
    probe = f"import sys, {module}; print(sorted({{'torch', 'numba'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_no_regular_package_shadows_a_library() -> None:
    """`kernels` is also a library of Hugging Face's: a regular package of that name at the root breaks transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
