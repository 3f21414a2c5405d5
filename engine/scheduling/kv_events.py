"""Events of one replica's prefix cache: which blocks can be found, so that routers know where a prefix is.

The messages and their fields are vLLM's; a batch is an array, an event a map with its name under `type`. A block's hash
is the last 64 bits of its digest, and a hit in our own cache never depends on it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from msgspec import Struct

from sempre.engine.scheduling.prefix_cache import BlockKey
from sempre.ipc.messages import AdapterSpec, RequestSpec

_MEDIUM = "GPU"
"""vLLM's word for the cache that a worker computes with, on any device"""


class BlockStored(Struct, frozen=True, tag=True, omit_defaults=True):
    """Consecutive blocks of one sequence can be found from now on; the first follows `parent_block_hash`, if any.

    `token_ids` are those of all blocks. `extra_keys`, one entry per block: what its hash depends on besides tokens, the
    name of the adapter and, for a sequence's first block, the cache salt.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(Struct, frozen=True, tag=True, omit_defaults=True):
    """These blocks can no longer be found."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Struct, frozen=True, tag=True):
    """No block can be found any more."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(Struct, frozen=True, array_like=True):
    """Events in the order in which they happened; `ts` in seconds since 1970."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int


class KVEvents:
    """Collects events until they are taken."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._unpack = struct.Struct(f"<{block_size}I").unpack
        self._events: list[KVEvent] = []

    def stored(self, spec: RequestSpec, keys: Sequence[BlockKey], index: int) -> None:
        """Block `index` of a request with these keys can be found."""
        key = keys[index]
        parent = block_hash(keys[index - 1]) if index else None
        extra = _extra_key(spec, index)
        name = None if spec.adapter is None else spec.adapter.name
        last = self._events[-1] if self._events else None
        if index and isinstance(last, BlockStored) and (last.block_hashes[-1], last.lora_name) == (parent, name):
            last.block_hashes.append(block_hash(key))
            last.token_ids.extend(self._unpack(key.packed_tokens))
            assert last.extra_keys is not None
            last.extra_keys.append(extra)
            return
        event = BlockStored(
            block_hashes=[block_hash(key)],
            parent_block_hash=parent,
            token_ids=[*self._unpack(key.packed_tokens)],
            block_size=self._block_size,
            lora_id=None if spec.adapter is None else lora_id(spec.adapter),
            medium=_MEDIUM,
            lora_name=name,
            extra_keys=[extra],
            group_idx=0,
            kv_cache_spec_kind="full_attention",
        )
        self._events.append(event)

    def removed(self, key: BlockKey) -> None:
        """The block with this key can no longer be found."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(block_hash(key))
        else:
            self._events.append(BlockRemoved(block_hashes=[block_hash(key)], medium=_MEDIUM, group_idx=0))

    def cleared(self) -> None:
        """The cache is empty; what happened before and was not taken no longer matters."""
        self._events = [AllBlocksCleared()]

    def take(self) -> list[KVEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events


def block_hash(key: BlockKey) -> int:
    """A block's hash in events, 64 bits."""
    return int.from_bytes(key.digest[-8:], "big")


def lora_id(adapter: AdapterSpec) -> int:
    """A number for an adapter, the same wherever it is loaded: of its files' digest."""
    return 1 + int(adapter.digest[:7], 16)


def _extra_key(spec: RequestSpec, index: int) -> tuple[str, ...] | None:
    adapter = () if spec.adapter is None else (spec.adapter.name,)
    salt = () if spec.cache_salt is None or index else (spec.cache_salt,)
    return (*adapter, *salt) or None
