"""Whether the workers of a coordinator that has died are gone: their memory is what their successors need."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping


class WorkerWatch:
    """Holds a descriptor of each worker process, taken while its coordinator lived: a number may be used again.

    Where the system has no such descriptors, all count as gone.
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}

    def follow(self, pids: Mapping[int, int]) -> None:
        """Follow these processes, by rank, in place of those that had the ranks before."""
        for rank, pid in pids.items():
            self._drop(rank)
            if hasattr(os, "pidfd_open"):
                try:
                    self._descriptors[rank] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue

    def running(self) -> list[int]:
        """The ranks whose process has not ended."""
        poller = select.poll()
        for descriptor in self._descriptors.values():
            poller.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poller.poll(0)}
        return [rank for rank, descriptor in self._descriptors.items() if descriptor not in ended]

    def close(self) -> None:
        for rank in list(self._descriptors):
            self._drop(rank)

    def _drop(self, rank: int) -> None:
        descriptor = self._descriptors.pop(rank, None)
        if descriptor is not None:
            os.close(descriptor)
