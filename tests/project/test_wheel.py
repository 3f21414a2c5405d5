"""The wheel holds every module and data file of the tree: a package missing from setup.cfg vanishes only there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "workers", "ipc", "kernels")
NOT_SHIPPED = ("engine/checkpoints/training/",)


def test_wheel_holds_every_module_and_checkpoint(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tree)]
    done = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = tmp_path.glob("sempre-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if ".dist-info/" not in n}
    expected = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in relative and not relative.startswith(NOT_SHIPPED):
                expected.add(f"sempre/{relative}")
    assert found == expected
