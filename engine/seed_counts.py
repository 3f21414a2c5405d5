"""How often each request came before, so that the same request without a seed gets a new one every time."""

from __future__ import annotations

import logging
import mmap
from typing import cast

logger = logging.getLogger(__name__)

MOST_DIGESTS = 1 << 22
"""Distinct requests remembered: about 4 million, 16 bytes each plus 4 in the index."""


class SeedCounts:
    """The number of earlier requests by digest, for at most `capacity` digests; then the oldest is dropped.

        entry i      digest (first 8 bytes), count, next entry with the same index slot (i + 1; 0 ends)
        index[d % capacity] → first entry

    Entries fill in order of first arrival; once all are in use, the next one overwrites the oldest.
    The memory is anonymous pages, which cost nothing until they are written. Not thread-safe.
    """

    def __init__(self, capacity: int = MOST_DIGESTS) -> None:
        self._capacity = capacity
        self._keys = _zeros(8 * capacity, "Q")
        self._counts = _zeros(4 * capacity, "I")
        self._following = _zeros(4 * capacity, "I")
        self._index = _zeros(4 * capacity, "I")
        self._num_entries = 0
        self._oldest = 0
        self.num_dropped = 0
        """Digests forgotten: if such a request comes again, it gets its first seed again."""

    def count(self, digest: bytes) -> int:
        """Return how many requests with this digest came before, and count one more."""
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
        if self._num_entries < self._capacity:
            self._num_entries += 1
            return self._num_entries - 1
        slot = self._oldest
        self._oldest = (slot + 1) % self._capacity
        self._unlink(slot)
        if self.num_dropped == 0:
            logger.warning(
                "%d different requests without a seed have been seen: from now on the oldest are forgotten, and one "
                "that comes again begins with its first seed",
                self._capacity,
            )
        self.num_dropped += 1
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


def _zeros(num_bytes: int, kind: str) -> memoryview[int]:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return cast("memoryview[int]", memoryview(pages).cast(kind))  # type: ignore[call-overload]
