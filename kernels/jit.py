"""How the CPU kernels are compiled: once per machine, without fast-math, into the user's cache folder.

The cache folder is named after a digest of the kernels' sources: a kernel's code is generated from many files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from numba.core.event import TimingListener, register

from sempre.kernels.kernel_cache import KernelCache, private_folder

Kernel = Callable[..., Any]

_COMPILATION = TimingListener()
register("numba:compile", _COMPILATION)


def compile_seconds() -> float:
    """Return how long this process has compiled kernels, or waited for that; 0 if all came from the cache folder."""
    return float(_COMPILATION.duration) if _COMPILATION.done else 0.0


@contextmanager
def counted_as_compilation() -> Iterator[None]:
    """Count the time of the body, in which another process compiles."""
    _COMPILATION.on_start(None)
    try:
        yield
    finally:
        _COMPILATION.on_end(None)


@cache
def cache_folder() -> Path | None:
    """`<user cache>/sempre/kernels/<digest>`, created; None where it cannot be written or is another user's.

    That is no reason to fail: the kernels are then compiled in each process.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    root = Path(__file__).parent
    for source in sorted(path for path in root.rglob("*.py") if not path.name.startswith("gpu")):
        digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    base = os.environ.get("SEMPRE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sempre"
    )
    return private_folder(Path(base) / "kernels" / digest.hexdigest()[:16])


def compiled(*, parallel: bool = False) -> Callable[[Kernel], Kernel]:
    """Decorator: numba without fast-math, GIL released, NumPy's error model (no exceptions), cached on disk."""

    def decorate(function: Kernel) -> Kernel:
        kernel: Kernel = numba.njit(function, nogil=True, parallel=parallel, fastmath=False, error_model="numpy")
        folder = cache_folder()
        if folder is not None:
            # where numba keeps its own cache object
            name = function.__name__ + (".parallel" if parallel else "")
            kernel._cache = KernelCache(function, folder, name)  # type: ignore[attr-defined]
        return kernel

    return decorate


def is_kept(kernel: Kernel) -> bool:
    """Whether the cache folder holds code of a compiled function, for whichever types; True where nothing is kept."""
    return cache_folder() is None or kernel._cache.has_code  # type: ignore[attr-defined]


class Twice(NamedTuple):
    """One function with loops over `prange`, compiled twice: for few rows, starting threads costs more than it
    saves."""

    serial: Kernel
    parallel: Kernel


def compiled_twice(function: Kernel) -> Twice:
    """Decorator: like `compiled`, for one thread and for all. The bits are equal."""
    return Twice(compiled()(function), compiled(parallel=True)(function))


@compiled()
def address_of(array: np.ndarray) -> np.int64:
    """The address of a contiguous array's first element, for use inside kernels.

    An array created in a kernel must be passed to `keep` after the last use of its address: numba frees it after the
    last use of the array itself.
    """
    return np.int64(array.ctypes.data)


@compiled()
def keep(array: np.ndarray) -> None:
    """Does nothing, but the array lives at least until here."""
    return
