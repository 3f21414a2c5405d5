"""Links between ranks that are threads of this process, on loopback."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from sempre.ipc.curve import Gate
from sempre.ipc.key_pairs import KeyPair, WorkerKeys
from sempre.ipc.rank_links import RankLinks


def keys_of(count: int, first: int = 0) -> dict[int, WorkerKeys]:
    """Those of ranks `first` and after."""
    pairs = {rank: KeyPair.new() for rank in range(first, first + count)}
    return {
        rank: WorkerKeys(own=pair, peers={peer: other.public for peer, other in pairs.items() if peer != rank})
        for rank, pair in pairs.items()
    }


@cache
def shared_gate() -> Gate:
    """That of this process, which has only one."""
    gate = Gate()
    atexit.register(gate.close)
    return gate


@contextmanager
def linked(count: int, first: int = 0) -> Iterator[list[RankLinks]]:
    """Connected links of `count` ranks."""
    links = [RankLinks(rank, "127.0.0.1", keys, shared_gate()) for rank, keys in keys_of(count, first).items()]
    addresses = {first + place: link.address for place, link in enumerate(links)}
    try:
        yield [link.connect(addresses) for link in links]
    finally:
        for link in links:
            link.close()
