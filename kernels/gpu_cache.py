"""Triton's cache folder with a digest beside every file, so that a damaged file is recompiled and not loaded.

The folder holds machine code and shared libraries. A file counts as absent unless it belongs to this user and has the
digest recorded when it was written. Where nothing can be written, files live in a temporary folder of this process: the
next start compiles again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

from triton.runtime.cache import FileCacheManager

logger = logging.getLogger(__name__)

_SUFFIX = ".sha256"


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sempre-kernels-")


class CheckedCache(FileCacheManager):  # type: ignore[misc]
    """The files of one compiled kernel, or of one other entry."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        # those folders are filled manually
        self._by_hand = override or dump
        try:
            super().__init__(key, override=override, dump=dump)
        except OSError as error:
            self.key = key
            self._move_aside(error)

    def has_file(self, filename: str) -> bool:
        return bool(super().has_file(filename)) and self._is_whole(self._make_path(filename))

    def get_group(self, filename: str) -> dict[str, str] | None:
        group: dict[str, str] | None = super().get_group(filename)
        if group is None or not all(map(self._is_whole, group.values())):
            return None
        return group

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
        try:
            return self._put(data, filename, binary)
        except OSError as error:
            self._move_aside(error)
            return self._put(data, filename, binary)

    def _put(self, data: bytes | str, filename: str, binary: bool) -> str:
        path = str(super().put(data, filename, binary))
        contents = data if isinstance(data, bytes) else str(data).encode()
        super().put(hashlib.sha256(contents).hexdigest(), filename + _SUFFIX, binary=False)
        return path

    def _is_whole(self, path: str) -> bool:
        if self._by_hand:
            return True
        try:
            with open(path, "rb") as file:
                owner = os.fstat(file.fileno()).st_uid
                found = hashlib.file_digest(file, "sha256").hexdigest()
            expected = Path(path + _SUFFIX).read_text(errors="replace")
        except FileNotFoundError:
            return False
        except OSError as error:
            _warn_once(f"a kernel in {Path(path).parent.parent} cannot be read, so it is compiled again: {error}")
            return False
        if owner == os.geteuid() and found == expected:
            return True
        _warn_once(f"the kernel cache {Path(path).parent.parent} is damaged; the affected kernels are compiled again")
        return False

    def _move_aside(self, error: OSError) -> None:
        """Use the temporary folder from now on."""
        _warn_once(f"kernels cannot be kept, the next start compiles them again: {error}")
        self.cache_dir = os.path.join(_temporary().name, self.key)
        self.lock_path = os.path.join(self.cache_dir, "lock")
        os.makedirs(self.cache_dir, exist_ok=True)
