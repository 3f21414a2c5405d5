"""A worker's links to other hosts: to the coordinator's hub, and to ranks of its replica."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import msgspec

from sempre.ipc.curve import ClientKeys, Gate
from sempre.ipc.key_pairs import WorkerKeys
from sempre.ipc.rank_links import RankLinks


@dataclass
class HostLinks:
    """Those of one worker."""

    keys: WorkerKeys
    links: RankLinks | None
    """None: all ranks of its replica are on its host"""
    gate: Gate | None

    @property
    def hub_keys(self) -> ClientKeys | None:
        """None: the hub is on its host."""
        return ClientKeys(self.keys.own, self.keys.hub) if self.keys.hub else None

    @property
    def address(self) -> str:
        """Where other ranks reach it; empty: they need not."""
        return "" if self.links is None else self.links.address

    def close(self) -> None:
        """Before the process ends."""
        if self.links is not None:
            self.links.close()
        if self.gate is not None:
            self.gate.close()


def read_host_links(options: argparse.Namespace) -> HostLinks | None:
    """Read the keys that the worker is given and listen, if the command line says so. Raises ProtocolError."""
    if not options.keys_from_stdin:
        return None
    keys = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerKeys)
    if not keys.peers:
        return HostLinks(keys, None, None)
    gate = Gate()
    return HostLinks(keys, RankLinks(options.rank, options.listen, keys, gate), gate)
