"""What ranks of a stage on several hosts write for each other, moved as it is.

Each rank sends the others what it has written, and puts what they send where they would have written it in memory of
one host. Sums are added by every rank from the same slots, so their bits are those of one host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sempre.ipc.errors import ProtocolError
from sempre.ipc.rank_links import RankLinks
from sempre.workers.parallel import WrittenRows

# of a rank's part; as much is exchanged at a time
_PIECE_BYTES = 2 << 20


class LinkedExchange:
    """`parallel.Exchange` between processes of several hosts."""

    def __init__(self, links: RankLinks, rank: int, ranks: Sequence[int], *, patience_s: float) -> None:
        """`ranks` are those of the stage, `rank` among them. One that lets the others wait for `patience_s` has
        failed."""
        self._links = links
        self._rank = rank
        self._ranks = list(ranks)
        self._own = self._ranks.index(rank)
        self._patience_s = patience_s
        # two take turns, since the last one is still read while the next one is written
        self._memory = [torch.empty(0, dtype=torch.float32, device="cpu") for _ in range(2)]
        self._number = 0

    def most_rows(self, width: int) -> int:
        """See `Exchange`."""
        return max(1, _PIECE_BYTES // (width * 4))

    def slots(self, rows: int, width: int) -> torch.Tensor:
        """See `Exchange`."""
        shape = (len(self._ranks), rows, width)
        which = self._number % 2
        if self._memory[which].numel() < len(self._ranks) * rows * width:
            self._memory[which] = torch.empty(len(self._ranks) * rows * width, dtype=torch.float32, device="cpu")
        self._slots = self._memory[which][: len(self._ranks) * rows * width].view(shape)
        return self._slots

    def wait(self, written: WrittenRows | None = None) -> None:
        """See `Exchange`. Raises EngineUnhealthy, naming the rank that does not come, and ProtocolError."""
        self._number += 1
        if written is None:
            parts = [self._slots[self._own].numpy()]
        else:
            places = written.places.contiguous()
            parts = [places.numpy(), written.rows.index_select(0, places).numpy()]
        for rank in self._ranks:
            if rank != self._rank:
                self._links.send(rank, [part.data.cast("B") if part.size else b"" for part in parts])
        for place, rank in enumerate(self._ranks):
            if rank != self._rank:
                found = self._links.receive(rank, self._patience_s)
                self._put(place, rank, found, written)

    def _put(self, place: int, rank: int, found: list[bytes], written: WrittenRows | None) -> None:
        if written is None:
            slot = self._slots[place].numpy()
            self._check(rank, [slot.nbytes], found)
            slot[...] = np.frombuffer(found[0], np.float32).reshape(slot.shape)
            return
        rows = written.rows.numpy()
        fits = len(found) == 2 and len(found[0]) % 8 == 0
        places = np.frombuffer(found[0] if fits else b"", np.int64)
        self._check(rank, [places.nbytes, len(places) * rows[0].nbytes], found)
        if len(places) and (places.min() < 0 or places.max() >= len(rows)):
            raise self._refused(rank, f"rows below {len(rows)}", f"{places.min()} to {places.max()}")
        rows[places] = np.frombuffer(found[1], np.float32).reshape(len(places), rows.shape[1])

    def _check(self, rank: int, expected: list[int], found: list[bytes]) -> None:
        sizes = [len(part) for part in found]
        if sizes != expected:
            raise self._refused(rank, f"parts of {expected} bytes", f"{sizes}")

    def _refused(self, rank: int, expected: str, found: str) -> ProtocolError:
        return ProtocolError(
            f"rank {self._rank}: exchange {self._number}: expected {expected} from rank {rank}, found {found}"
        )
