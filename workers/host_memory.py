"""Memory that a worker on a CPU gives back while and after it loads a model."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

import torch

_MADV_DONTNEED = 4  # of Linux


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library; None where what it is asked for here means something else, or is missing."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


class MappedFiles:
    """Mapped files that nobody writes to. What leaves the memory stays valid: what is read again comes from the file,
    which usually is in the page cache."""

    def __init__(self) -> None:
        self._ranges: list[range] = []

    def drop(self, tensor: torch.Tensor) -> None:
        """Let go of the memory of a tensor if it is a view of a mapped file; of any other it is left alone."""
        libc, start = _libc(), tensor.data_ptr()
        if libc is None or not self._holds(start):
            return
        page = mmap.PAGESIZE
        first = -(-start // page) * page
        size = (start + tensor.nbytes) // page * page - first
        if size > 0:
            # advice: where it is refused, the pages stay until the file is closed
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_DONTNEED)

    def _holds(self, address: int) -> bool:
        if not any(address in known for known in self._ranges):
            self._ranges = [*_mapped_files()]
        return any(address in known for known in self._ranges)


def _mapped_files() -> list[range]:
    """Where this process has mapped checkpoint files."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, last = line.split()
        if last.endswith(".safetensors"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(range(start, end))
    return found


def give_back_free_memory() -> None:
    """Return what the C library keeps of freed memory to the system, if it is one that can."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
