"""Memory that the ranks of one replica share on a host.

It is a file without a name that the coordinator hands to each worker: nobody else can open it, and it is gone with the
last of them. Two halves take turns, so that one `wait` for each exchange is enough: whoever writes a half again has
waited since, and nobody waits before it has read the half before.
"""

from __future__ import annotations

import mmap
import os
import time

import torch

from sempre.ipc.errors import EngineUnhealthy, StartupError
from sempre.kernels.exchange import LINE, enter, meet

# of one half: the widest row, the logits of 2**24 tokens, fits
_HALF_BYTES = 64 << 20
# as much is exchanged at a time, so that it stays in the caches
_PIECE_BYTES = 8 << 20
_HEADER_BYTES = mmap.PAGESIZE
# with a core for each rank, about as long as two kernels of a step take
_SPINS = 20_000
_SPINS_OF_SHARED_CORES = 200
_WAIT_S = 0.2


class SharedMemoryExchange:
    """`parallel.Exchange` between processes of one host."""

    def __init__(self, descriptor: int, rank: int, size: int, *, threads: int = 1, patience_s: float = 120.0) -> None:
        """`descriptor` is an open file, empty at first, for this replica alone. `threads`: of each rank. A rank that
        lets the others wait for `patience_s` has failed. Raises StartupError if another process is this rank."""
        total = _HEADER_BYTES + 2 * _HALF_BYTES
        os.ftruncate(descriptor, total)
        self._memory = torch.frombuffer(mmap.mmap(descriptor, total), dtype=torch.int8)
        self._lines = self._memory[: size * LINE]
        self._halves = self._memory[_HEADER_BYTES:].view(torch.float32).chunk(2)
        self._rank = rank
        self._size = size
        self._patience_s = patience_s
        self._number = 0
        self._spins = _SPINS if size * threads <= len(os.sched_getaffinity(0)) else _SPINS_OF_SHARED_CORES
        if not enter(self._lines, rank):
            text = f"rank {rank}: expected one worker of each rank, found one that has joined the replica already"
            raise StartupError(text, rank=rank)

    def most_rows(self, width: int) -> int:
        """See `Exchange`."""
        return max(1, _PIECE_BYTES // (self._size * width * 4))

    def slots(self, rows: int, width: int) -> torch.Tensor:
        """See `Exchange`."""
        half = self._halves[self._number % 2]
        return half[: self._size * rows * width].view(self._size, rows, width)

    def wait(self) -> None:
        """Raises EngineUnhealthy, naming the rank that does not come."""
        self._number += 1
        missing = meet(self._lines, self._rank, self._number, spins=self._spins, wait_s=_WAIT_S)
        if missing is None:
            return
        deadline = time.monotonic() + self._patience_s
        while missing is not None:
            if time.monotonic() > deadline:
                text = (
                    f"rank {self._rank}: exchange {self._number}: expected rank {missing} within"
                    f" {self._patience_s:g} s, found it missing"
                )
                raise EngineUnhealthy(text, rank=missing, cause="missing")
            missing = meet(self._lines, self._rank, self._number, spins=0, wait_s=_WAIT_S)
