"""How often each request came before, so that the same request without a seed gets a new one every time."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

logger = logging.getLogger(__name__)

MOST_DIGESTS = 1 << 22
"""Distinct requests remembered: about 4 million, 16 bytes each plus 4 in the index."""


class SeedCounts:
    """The number of earlier requests by digest, for at most `capacity` digests; then the oldest is dropped.

        entry i      digest (first 8 bytes), count, next entry with the same index slot (i + 1; 0 ends)
        index[d % capacity] → first entry

    Entries fill in order of first arrival; once all are in use, the next one overwrites the oldest.
    The memory is anonymous pages, or those of a sparse file: both cost nothing until they are written. Processes that
    share a file count together, one at a time. Not thread-safe.
    """

    def __init__(self, capacity: int = MOST_DIGESTS, shared: Path | None = None) -> None:
        """`shared`: a file for processes of one host; the first one creates it."""
        self._capacity = capacity
        self._file = None if shared is None else os.open(shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        pages = _zeros(24 + 20 * capacity, self._file)
        # entries in use, the oldest entry, digests forgotten
        self._header = _section(pages, 0, 3, "Q")
        self._keys = _section(pages, 24, capacity, "Q")
        self._counts, self._following, self._index = (
            _section(pages, 24 + offset * capacity, capacity, "I") for offset in (8, 12, 16)
        )

    @property
    def num_dropped(self) -> int:
        """Digests forgotten: if such a request comes again, it gets its first seed again."""
        return self._header[2]

    def count(self, digest: bytes) -> int:
        """Return how many requests with this digest came before, and count one more."""
        with self._alone():
            return self._count(digest)

    def close(self) -> None:
        """Close the file, if any."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out; the kernel does not forget a process that ends meanwhile."""
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _count(self, digest: bytes) -> int:
        key = int.from_bytes(digest[:8], "little")
        place = key % self._capacity
        entry = self._index[place]
        while entry:
            if self._keys[entry - 1] == key:
                before = self._counts[entry - 1]
                self._counts[entry - 1] = (before + 1) % 2**32
                return before
            entry = self._following[entry - 1]
        slot = self._free_slot()
        self._keys[slot], self._counts[slot] = key, 1
        self._following[slot], self._index[place] = self._index[place], slot + 1
        return 0

    def _free_slot(self) -> int:
        num_entries, slot, _ = self._header
        if num_entries < self._capacity:
            self._header[0] += 1
            return num_entries
        self._header[1] = (slot + 1) % self._capacity
        self._unlink(slot)
        if self.num_dropped == 0:
            logger.warning(
                "%d different requests without a seed have been seen: from now on the oldest are forgotten, and one "
                "that comes again begins with its first seed",
                self._capacity,
            )
        self._header[2] += 1
        return slot

    def _unlink(self, slot: int) -> None:
        """Remove an entry from the chain of its slot."""
        place = self._keys[slot] % self._capacity
        if self._index[place] == slot + 1:
            self._index[place] = self._following[slot]
            return
        entry = self._index[place] - 1
        while self._following[entry] != slot + 1:
            entry = self._following[entry] - 1
        self._following[entry] = self._following[slot]


class Numbering(NamedTuple):
    """How requests without an id are named, by the prefix and their number, and those without a seed counted."""

    prefix: str
    seed_counts: SeedCounts


def _zeros(num_bytes: int, file: int | None) -> memoryview[int]:
    if file is None:
        return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    # the same size for every process: this changes nothing for all but the first
    os.ftruncate(file, num_bytes)
    return memoryview(mmap.mmap(file, num_bytes, flags=mmap.MAP_SHARED))


def _section(pages: memoryview[int], start: int, count: int, kind: str) -> memoryview[int]:
    size = 8 if kind == "Q" else 4
    part = pages[start : start + size * count]
    return cast("memoryview[int]", part.cast(kind))  # type: ignore[call-overload]
