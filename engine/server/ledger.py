"""Numbers that the API processes of one server keep together.

    row 0 … n-1   one per process, which alone writes it; everybody reads the sum of a column
    row n         what all of them write, one at a time

Counters outlive the process that counted. A gauge belongs to a process that lives, so its successor begins with zero.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast


class Place(NamedTuple):
    """Which of several processes this one is, and the file that they share."""

    number: int
    num_processes: int
    path: Path


class Cells:
    """Some columns: this process's own, and their sums."""

    __slots__ = ("_rows", "own")

    def __init__(self, rows: list[memoryview[float]], own: memoryview[float]) -> None:
        self._rows = rows
        self.own = own

    def totals(self) -> list[float]:
        """Return the sum of each column over all processes."""
        return [sum(column) for column in zip(*self._rows, strict=True)]

    def total(self, column: int = 0) -> float:
        """Return the sum of one column."""
        return sum(row[column] for row in self._rows)


class Ledger:
    """Hands out columns; every process asks for the same ones in the same order."""

    def __init__(self, place: Place | None = None, num_columns: int = 1024) -> None:
        """`place` None: this process is alone."""
        num_processes = 1 if place is None else place.num_processes
        num_bytes = 8 * num_columns * (num_processes + 1)
        self._file = None if place is None else os.open(place.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._file is None:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            os.ftruncate(self._file, num_bytes)
            pages = mmap.mmap(self._file, num_bytes, flags=mmap.MAP_SHARED)
        view = cast("memoryview[float]", memoryview(pages).cast("d"))  # type: ignore[redundant-cast]
        self._rows = [view[row * num_columns : (row + 1) * num_columns] for row in range(num_processes + 1)]
        self._index = 0 if place is None else place.number
        self._num_columns = num_columns
        self._num_used = 0

    def counter(self, count: int) -> Cells:
        """Return the next `count` columns, for what only grows."""
        begin, self._num_used = self._num_used, self._num_used + count
        if self._num_used > self._num_columns:
            raise IndexError(f"the ledger has {self._num_columns} columns, and {self._num_used} are needed")
        rows = [row[begin : begin + count] for row in self._rows[:-1]]
        return Cells(rows, rows[self._index])

    def gauge(self, count: int) -> Cells:
        """Return the next `count` columns, for what is now; this process's own begin with zero."""
        cells = self.counter(count)
        cells.own[:] = cast("memoryview[float]", memoryview(bytes(8 * count)).cast("d"))  # type: ignore[redundant-cast]
        return cells

    def common(self, count: int) -> memoryview[float]:
        """Return the next `count` cells that all processes write, within `alone`."""
        begin, self._num_used = self._num_used, self._num_used + count
        return self._rows[-1][begin : begin + count]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out; the lock of a process that ends is free."""
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
