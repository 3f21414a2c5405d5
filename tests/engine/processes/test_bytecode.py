"""An engine's processes keep bytecode where torch came without it: compiling its sources takes seconds of a start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
from sempre.engine.child_process import child_environment
names = ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")
print(json.dumps({name: value for name, value in child_environment().items() if name in names}))
"""


@pytest.fixture
def torch_without_bytecode(tmp_path: Path) -> Path:
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("print('imported')\n")
    return package


def run(program: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def environment_of(package: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    cache = str(package.parent.parent / "cache")
    return inherited | {"PYTHONPATH": str(package.parent), "SEMPRE_CACHE": cache} | more


def test_bytecode_goes_to_the_cache_folder_where_it_may_not_be_written(torch_without_bytecode: Path) -> None:
    environment = environment_of(torch_without_bytecode, PYTHONDONTWRITEBYTECODE="1")
    variables = json.loads(run(PROGRAM, environment))
    folder = environment["SEMPRE_CACHE"] + "/bytecode"
    assert variables == {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    assert list(Path(folder).rglob("*.pyc")) == []
    assert run("import torch", environment | variables) == "imported\n"
    assert "torch" in [path.parent.name for path in Path(folder).rglob("*.pyc")]
    assert not (torch_without_bytecode / "__pycache__").exists()


def test_bytecode_stays_where_it_is_or_may_be_written(torch_without_bytecode: Path) -> None:
    environment = environment_of(torch_without_bytecode)
    assert json.loads(run(PROGRAM, environment)) == {}
    run("import torch", environment)
    forbidden = environment | {"PYTHONDONTWRITEBYTECODE": "1"}
    assert (torch_without_bytecode / "__pycache__").exists()
    assert json.loads(run(PROGRAM, forbidden)) == {"PYTHONDONTWRITEBYTECODE": "1"}
