"""Where compiled kernels are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = (
    "import numpy as np; from sempre.kernels.jit import address_of, cache_folder\n"
    "array = np.zeros(4); assert address_of(array) == array.ctypes.data; print(cache_folder())"
)


def _folder(cache: str, temporary: Path) -> str:
    environment = os.environ | {"SEMPRE_CACHE": cache, "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_are_kept_in_the_user_s_cache(tmp_path: Path) -> None:
    folder = Path(_folder(str(tmp_path / "cache"), tmp_path))
    assert folder.parent == tmp_path / "cache" / "kernels"
    assert list(folder.rglob("*.kernel"))


def test_without_a_writable_cache_they_are_compiled_again_and_nothing_is_left(tmp_path: Path) -> None:
    assert _folder("/proc/nowhere", tmp_path) == "None"
    assert list(tmp_path.iterdir()) == []
