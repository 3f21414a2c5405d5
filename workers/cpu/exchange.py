"""Memory that the ranks of one replica share on a host.

It is a file without a name that the coordinator hands to each worker: nobody else can open it, and it is gone with the
last of them. Two halves take turns, so that one `wait` for each exchange is enough: whoever writes a half again has
waited since, and nobody waits before it has read the half before.
"""

from __future__ import annotations

import mmap
import time

import torch

from sempre.ipc.errors import EngineUnhealthy, StartupError
from sempre.kernels.exchange import LINE, enter, meet
from sempre.workers.cpu.shared_file import Place, spins_of
from sempre.workers.parallel import WrittenRows

# of one half: the widest row, the logits of 2**24 tokens, fits
_HALF_BYTES = 64 << 20
# as much is exchanged at a time, so that it stays in the caches
_PIECE_BYTES = 8 << 20
_HEADER_BYTES = mmap.PAGESIZE
EXCHANGE_BYTES = _HEADER_BYTES + 2 * _HALF_BYTES
_WAIT_S = 0.2


class SharedMemoryExchange:
    """`parallel.Exchange` between processes of one host."""

    def __init__(
        self,
        descriptor: int,
        rank: int,
        size: int,
        *,
        threads: int = 1,
        patience_s: float = 120.0,
        place: Place | None = None,
    ) -> None:
        """`descriptor` is an open file, empty at first, for this replica alone; `place`: in it, by default all of it.
        `threads`: of each rank. A rank that lets the others wait for `patience_s` has failed. Raises StartupError if
        another process is this rank."""
        place = place or Place(EXCHANGE_BYTES, 0)
        self._memory = place.map(descriptor, EXCHANGE_BYTES)
        self._first_rank = place.first_rank
        self._lines = self._memory[: size * LINE]
        self._halves = self._memory[_HEADER_BYTES:].view(torch.float32).chunk(2)
        self._rank = rank
        self._size = size
        self._patience_s = patience_s
        self._number = 0
        self._spins = spins_of(size * threads)
        if not enter(self._lines, rank):
            number = place.first_rank + rank
            text = f"rank {number}: expected one worker of each rank, found one that has joined the replica already"
            raise StartupError(text, rank=number)

    def most_rows(self, width: int) -> int:
        """See `Exchange`."""
        return max(1, _PIECE_BYTES // (self._size * width * 4))

    def slots(self, rows: int, width: int) -> torch.Tensor:
        """See `Exchange`."""
        half = self._halves[self._number % 2]
        return half[: self._size * rows * width].view(self._size, rows, width)

    def wait(self, written: WrittenRows | None = None) -> None:
        """Raises EngineUnhealthy, naming the rank that does not come."""
        self._number += 1
        missing = meet(self._lines, self._rank, self._number, spins=self._spins, wait_s=_WAIT_S)
        if missing is None:
            return
        deadline = time.monotonic() + self._patience_s
        while missing is not None:
            if time.monotonic() > deadline:
                own, other = self._first_rank + self._rank, self._first_rank + missing
                text = (
                    f"rank {own}: exchange {self._number}: expected rank {other} within"
                    f" {self._patience_s:g} s, found it missing"
                )
                raise EngineUnhealthy(text, rank=other, cause="missing")
            missing = meet(self._lines, self._rank, self._number, spins=0, wait_s=_WAIT_S)
