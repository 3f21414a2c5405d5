"""The file that the ranks of a replica share, and how long to look before sleeping on it."""

from __future__ import annotations

import mmap
import os
from typing import NamedTuple

import torch

# with a core for each rank, about as long as two kernels of a step take
_SPINS = 20_000
_SPINS_OF_SHARED_CORES = 200


class Place(NamedTuple):
    """Where in the file something lies. What nobody writes takes no memory."""

    file_bytes: int
    """of the whole file, the same for all who have it"""
    start: int
    """a multiple of the page size"""
    first_rank: int = 0
    """the lowest rank that has it"""

    def map(self, descriptor: int, size: int) -> torch.Tensor:
        """The memory, int8 [size], zeros at first."""
        os.ftruncate(descriptor, self.file_bytes)
        return torch.frombuffer(mmap.mmap(descriptor, size, offset=self.start), dtype=torch.int8)


def spins_of(num_threads: int) -> int:
    """How often a process looks before it sleeps, where so many threads compute at once."""
    return _SPINS if num_threads <= len(os.sched_getaffinity(0)) else _SPINS_OF_SHARED_CORES
