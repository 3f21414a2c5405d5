"""How the CPU kernels are compiled: once per machine, without fast-math, into the user's cache folder.

The cache folder carries a digest of the kernels' sources: numba watches only the file of the compiled function, and
would keep a stale kernel when a file that generates its code has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import config

Kernel = Callable[..., Any]


@cache
def cache_folder() -> Path | None:
    """`<user cache>/sempre/kernels/<digest>`, created; None where it cannot be written.

    A read-only home is no reason to fail: the kernels are then compiled anew in each process.
    """
    digest = hashlib.sha256(f"{numba.__version__}".encode())
    root = Path(__file__).parent
    for source in sorted(path for path in root.rglob("*.py") if not path.name.startswith("gpu")):
        digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    base = os.environ.get("SEMPRE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sempre"
    )
    folder = Path(base) / "kernels" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def compiled(*, parallel: bool = False) -> Callable[[Kernel], Kernel]:
    """Decorator: numba without fast-math, GIL released, NumPy's error model (no exceptions), cached on disk."""

    def decorate(function: Kernel) -> Kernel:
        folder = cache_folder()
        previous = config.CACHE_DIR
        config.CACHE_DIR = str(folder or "")
        try:
            kernel: Kernel = numba.njit(
                function, cache=folder is not None, nogil=True, parallel=parallel, fastmath=False, error_model="numpy"
            )
            return kernel
        finally:
            config.CACHE_DIR = previous

    return decorate


@compiled()
def address_of(array: np.ndarray) -> np.int64:
    """The address of a contiguous array's first element, for use inside kernels.

    An array made in a kernel must be passed to `keep` behind the last use of its address: numba frees it after the
    last use of the array itself.
    """
    return np.int64(array.ctypes.data)


@compiled()
def keep(array: np.ndarray) -> None:
    """Nothing; the array lives at least until here."""
    return
