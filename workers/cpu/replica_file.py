"""What lies where in the file that the ranks of a replica share: an exchange for each stage, then the stages' rings.

Rank r of the replica is number r % size of its stage r // size. It has rings to and from its number in the other
stages: hidden states go to the next stage, reports from the last one to all others.
"""

from __future__ import annotations

from dataclasses import dataclass

from sempre.workers.cpu.exchange import EXCHANGE_BYTES, SharedMemoryExchange
from sempre.workers.cpu.shared_file import Place, spins_of
from sempre.workers.cpu.stage_link import RING_MEMORY_BYTES, Ring, SharedMemoryLink
from sempre.workers.stages import ALL_LAYERS, Stage


@dataclass(frozen=True)
class ReplicaFile:
    """The file, as one rank has it: `size` ranks in each of `num_stages` stages."""

    descriptor: int
    """open, and empty at first"""
    size: int
    num_stages: int
    rank: int
    """of the replica"""
    threads: int = 1
    """of each rank"""
    patience_s: float = 120.0
    """after which a rank that is waited for has failed"""

    def exchange(self) -> SharedMemoryExchange | None:
        """With the other ranks of the stage; None: there are none. Raises StartupError."""
        if self.size == 1:
            return None
        stage, number = divmod(self.rank, self.size)
        place = Place(self._file_bytes, stage * EXCHANGE_BYTES, stage * self.size)
        return SharedMemoryExchange(
            self.descriptor, number, self.size, threads=self.threads, patience_s=self.patience_s, place=place
        )

    def stage(self) -> Stage:
        """This rank's, linked to the others. Raises StartupError."""
        if self.num_stages == 1:
            return ALL_LAYERS
        own, last = self.rank // self.size, self.num_stages - 1
        previous = self._ring(own - 1, own, at=own - 1) if own else None
        following = self._ring(own, own + 1, at=own) if own < last else None
        # the rings of reports follow those of hidden states
        earlier = range(last) if own == last else (own,)
        reports = [self._ring(last, stage, at=last + stage) for stage in earlier]
        link = SharedMemoryLink(self.rank, previous, following, reports, is_last=own == last)
        return Stage(own, self.num_stages, link)

    @property
    def _num_exchanges(self) -> int:
        return self.num_stages if self.size > 1 else 0

    @property
    def _file_bytes(self) -> int:
        return self._num_exchanges * EXCHANGE_BYTES + 2 * (self.num_stages - 1) * self.size * RING_MEMORY_BYTES

    def _ring(self, writer: int, reader: int, *, at: int) -> Ring:
        """From stage `writer` to stage `reader`, number `at` of those of this rank's number."""
        own, number = divmod(self.rank, self.size)
        start = self._num_exchanges * EXCHANGE_BYTES + (at * self.size + number) * RING_MEMORY_BYTES
        peer = reader if own == writer else writer
        return Ring(
            Place(self._file_bytes, start).map(self.descriptor, RING_MEMORY_BYTES),
            writes=own == writer,
            ranks=(self.rank, peer * self.size + number),
            spins=spins_of(self.num_stages * self.size * self.threads),
            patience_s=self.patience_s,
        )
