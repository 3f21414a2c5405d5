"""Compiled CPU kernels on disk: one file each, starting with a digest of its contents.

The contents are pickles, so nothing is unpickled that another user could have written or that is incomplete: the folder
and each file belong to this user, nobody else may enter the folder, and the digest is checked first. A file that fails
is recompiled and overwritten. The cache only saves time: what cannot be read or written is logged once, and the kernel
is compiled in this process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32


@cache
def warn_once(message: str) -> None:
    logger.warning(message)


def private_folder(folder: Path) -> Path | None:
    """`folder`, created if needed, for this user alone; None if that is impossible."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.geteuid():
            warn_once(
                f"the kernel cache {folder} is not a folder of this user, so kernels are compiled in each process;"
                " remove it, or set SEMPRE_CACHE to another folder"
            )
            return None
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError:
        # a read-only home is common and not an error
        return None
    return folder if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else None


class KernelFiles:
    """The files of one function, one for each set of argument types."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._name}.*.kernel"):
            path.unlink(missing_ok=True)

    @property
    def any(self) -> bool:
        """Whether there is one, of whatever contents."""
        return any(True for _ in self._folder.glob(f"{self._name}.*.kernel"))

    def load(self, key: object) -> Any:
        """What was saved under `key`; None if there is nothing, or it is incomplete."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                owner = os.fstat(file.fileno()).st_uid
                contents = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            warn_once(f"a kernel in {self._folder} cannot be read, so it is compiled again: {error.strerror}")
            return None
        digest, data = contents[:_DIGEST_BYTES], contents[_DIGEST_BYTES:]
        if owner != os.geteuid() or hashlib.sha256(data).digest() != digest:
            warn_once(f"the kernel cache {self._folder} is damaged; the affected kernels are compiled again")
            return None
        return pickle.loads(data)

    def save(self, key: object, data: object) -> None:
        """Written completely or not at all; other processes may do the same at the same time."""
        contents = dumps(data)
        path = self._path(key)
        scratch = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            with open(scratch, "xb") as file:
                file.write(hashlib.sha256(contents).digest() + contents)
            if path.is_dir():
                path.rmdir()
            os.replace(scratch, path)
        except OSError as error:
            warn_once(f"kernels cannot be kept in {self._folder}, the next start compiles them again: {error.strerror}")
            scratch.unlink(missing_ok=True)

    def _path(self, key: object) -> Path:
        return self._folder / f"{self._name}.{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.kernel"


class _Implementation(CompileResultCacheImpl):  # type: ignore[misc]
    """numba's way of serialising a compiled function, without its search for a folder."""

    def __init__(self) -> None:
        """Skips that search."""


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Where numba looks up the compiled variants of one function."""

    def __init__(self, function: Callable[..., Any], folder: Path, name: str) -> None:
        """`name` distinguishes the function from others of its module, and one way to compile it from another."""
        self._name = repr(function)
        self._py_func = function
        self._impl = _Implementation()
        self._cache_path = str(folder)
        name = f"{function.__module__.removeprefix('sempre.')}.{name}.{sys.implementation.cache_tag}"
        self._cache_file = KernelFiles(folder, name)
        self.enable()

    @property
    def has_code(self) -> bool:
        return self._cache_file.any

    def _save_overload(self, signature: Any, data: Any) -> None:
        if self._enabled and self._impl.check_cachable(data):
            self._cache_file.save(self._index_key(signature, data.codegen), self._impl.reduce(data))
