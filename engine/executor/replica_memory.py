"""Memory that the ranks of a replica share on one host."""

from __future__ import annotations

import os


class ReplicaMemory:
    """Hands out a file descriptor for each replica of more than one rank, another one for each of its starts.

    The file has no name, so that no other process can open it, and it is gone with the last process that has it.
    """

    def __init__(self, ranks_per_replica: int) -> None:
        self._size = ranks_per_replica
        self._descriptors: dict[int, tuple[int, int]] = {}
        """by replica: the number of its start, and the descriptor"""

    def descriptor(self, rank: int, start: int) -> int | None:
        """That of `rank` in start number `start` of its replica, to be passed on to its process; None: it is alone."""
        if self._size == 1:
            return None
        replica = rank // self._size
        known = self._descriptors.get(replica)
        if known is None or known[0] != start:
            if known is not None:
                os.close(known[1])
            known = self._descriptors[replica] = (start, os.memfd_create(f"sempre-replica-{replica}"))
        return known[1]

    def close(self) -> None:
        """Can be called twice."""
        for _, descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
