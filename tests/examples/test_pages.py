"""Blocks of the README and of the pages that can run as they are, run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def environment(folder: Path) -> dict[str, str]:
    """With a `sempre` of this interpreter first on the path."""
    command = folder / "bin" / "sempre"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sempre.engine "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("page", "language"), [("README.md", "sh"), pytest.param("examples/workers.md", "bash", marks=pytest.mark.product)]
)
def test_outputs_that_are_said_to_be_equal_are(page: str, language: str, tmp_path: Path) -> None:
    [block] = [block for block in blocks(page, language) if "| cmp - alone.json" in block]
    done = subprocess.run(
        ["bash", "-eu", "-c", block],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert (tmp_path / "alone.json").stat().st_size > 100


@pytest.mark.parametrize("page", ["README.md", pytest.param("examples/workers.md", marks=pytest.mark.product)])
def test_the_first_python_block(page: str, tmp_path: Path) -> None:
    block = blocks(page, "python")[0]
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
