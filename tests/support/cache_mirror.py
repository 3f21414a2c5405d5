"""What a subscriber of KV events knows of a replica's prefix cache, rebuilt from messages as they are on the wire."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from sempre.engine.scheduling import Scheduler


class CacheMirror:
    """Applies events one by one; one that contradicts those before it fails."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, ...]] = {}
        """hash of each block → its tokens"""
        self.parents: dict[int, int | None] = {}
        self.extra_keys: dict[int, list[str] | None] = {}
        self.num_clears = 0

    def apply(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            match event["type"]:
                case "BlockStored":
                    self._store(event)
                case "BlockRemoved":
                    assert event["medium"] == "GPU"
                    for block in event["block_hashes"]:
                        del self.blocks[block], self.parents[block], self.extra_keys[block]
                case "AllBlocksCleared":
                    self.num_clears += 1
                    for known in (self.blocks, self.parents, self.extra_keys):
                        known.clear()
                case other:
                    raise AssertionError(other)

    def _store(self, event: dict[str, Any]) -> None:
        size, tokens, parent = event["block_size"], event["token_ids"], event["parent_block_hash"]
        assert len(tokens) == size * len(event["block_hashes"]) == size * len(event["extra_keys"])
        for index, block in enumerate(event["block_hashes"]):
            assert block not in self.blocks
            self.blocks[block] = tuple(tokens[index * size : (index + 1) * size])
            self.parents[block], parent = parent, block
            self.extra_keys[block] = event["extra_keys"][index]

    def apply_batch(self, payload: bytes) -> int:
        """Apply an encoded batch, and return its replica."""
        _, events, replica = msgspec.msgpack.decode(payload)
        self.apply(events)
        return int(replica)


def findable_blocks(scheduler: Scheduler) -> dict[int, tuple[int, ...]]:
    """What `CacheMirror.blocks` should be: of the cache itself."""
    cache = scheduler._kv_cache._prefix_cache
    keys = [key for key in cache._key_of_block if key is not None]
    unpack = struct.Struct(f"<{cache.block_size}I").unpack
    return {int.from_bytes(key.digest[-8:], "big"): unpack(key.packed_tokens) for key in keys}
