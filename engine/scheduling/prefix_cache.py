"""Content of a full block ↔ block.

A block's key chains SHA-256 over its whole prefix, so equal keys mean equal tokens from position 0 on:

    digest(block 0) = sha256(root(cache_salt, adapter) | token ids)
    digest(block i) = sha256(digest(block i-1) | token ids)        token ids: uint32 little-endian

Every part has a fixed length, so two different inputs never share a byte string.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple


class BlockKey(NamedTuple):
    """`digest` (32 bytes) identifies the block's content and its prefix; `packed_tokens` is the content."""

    digest: bytes
    packed_tokens: bytes


def root_digest(cache_salt: str | None, adapter: str | None = None) -> bytes:
    """Parent of a sequence's first block; requests with different salts or adapters never share a block.

    `adapter`: the digest of the adapter's files, hex.
    """
    salted = bytes(32) if cache_salt is None else hashlib.sha256(cache_salt.encode()).digest()
    return salted if adapter is None else hashlib.sha256(salted + bytes.fromhex(adapter)).digest()


class PrefixCache:
    """Maps keys to the blocks that hold their content, one block per key."""

    def __init__(self, num_blocks: int, block_size: int, on_removal: Callable[[BlockKey], None] | None = None) -> None:
        """`on_removal` is told the key of every block that is forgotten."""
        self.block_size = block_size
        self._on_removal = on_removal
        self._pack = struct.Struct(f"<{block_size}I").pack
        self._block_by_digest: dict[bytes, int] = {}
        self._key_of_block: list[BlockKey | None] = [None] * num_blocks

    def __len__(self) -> int:
        return len(self._block_by_digest)

    def extend_keys(
        self,
        keys: list[BlockKey],
        token_ids: Sequence[int],
        num_blocks: int,
        cache_salt: str | None,
        adapter: str | None = None,
    ) -> None:
        """Extend `keys` to the keys of the first `num_blocks` full blocks of `token_ids`, computed with `adapter`."""
        size = self.block_size
        parent = keys[-1].digest if keys else root_digest(cache_salt, adapter)
        for start in range(len(keys) * size, num_blocks * size, size):
            packed = self._pack(*token_ids[start : start + size])
            parent = hashlib.sha256(parent + packed).digest()
            keys.append(BlockKey(parent, packed))

    def find(self, key: BlockKey) -> int | None:
        """The block with this content, or None. Token ids are compared too: a hit never depends on the digest alone."""
        block = self._block_by_digest.get(key.digest)
        if block is None:
            return None
        found = self._key_of_block[block]
        return block if found is not None and found.packed_tokens == key.packed_tokens else None

    def insert(self, key: BlockKey, block: int) -> bool:
        """Add a full, written block. If another block already has the same content, that one stays the entry, and the
        answer is False."""
        if key.digest in self._block_by_digest:
            return False
        self._block_by_digest[key.digest] = block
        self._key_of_block[block] = key
        return True

    def holds(self, block: int) -> bool:
        """True if `block` can be found by its content."""
        return self._key_of_block[block] is not None

    def remove(self, block: int) -> None:
        """Forget the content of a block that is about to be overwritten."""
        key = self._key_of_block[block]
        assert key is not None
        del self._block_by_digest[key.digest]
        self._key_of_block[block] = None
        if self._on_removal is not None:
            self._on_removal(key)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the two maps are each other's inverse."""
        entries = {key.digest: block for block, key in enumerate(self._key_of_block) if key is not None}
        assert entries == self._block_by_digest
