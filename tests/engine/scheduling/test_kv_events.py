"""KV events have vLLM's fields; that they describe the cache in every history is checked in test_simulation.py."""

from __future__ import annotations

import hashlib
import struct

import msgspec

from sempre.engine.scheduling.kv_events import KVEventBatch, KVEvents, lora_id
from sempre.engine.scheduling.prefix_cache import BlockKey, PrefixCache, root_digest
from sempre.ipc.messages import AdapterSpec, RequestSpec, SamplingSpec

ADAPTER = AdapterSpec(name="pirate", path="/adapters/pirate", digest="ab" * 32)
TOKENS = [5, 6, 7, 8, 9, 10]


def spec(*, cache_salt: str | None = None, adapter: AdapterSpec | None = None) -> RequestSpec:
    params = SamplingSpec(max_tokens=1)
    return RequestSpec(
        request_id="r",
        prompt_token_ids=TOKENS,
        params=params,
        seed=7,
        ordinal=0,
        cache_salt=cache_salt,
        adapter=adapter,
    )


def keys_of(request: RequestSpec) -> list[BlockKey]:
    keys: list[BlockKey] = []
    adapter = None if request.adapter is None else request.adapter.digest
    PrefixCache(1, 2).extend_keys(keys, TOKENS, 3, request.cache_salt, adapter)
    return keys


def hashes(root: bytes) -> list[int]:
    """Of the three blocks of TOKENS, computed anew."""
    found, parent = [], root
    for start in (0, 2, 4):
        parent = hashlib.sha256(parent + struct.pack("<2I", *TOKENS[start : start + 2])).digest()
        found.append(int.from_bytes(parent[-8:], "big"))
    return found


def on_the_wire(events: KVEvents) -> object:
    batch = KVEventBatch(ts=1.5, events=events.take(), data_parallel_rank=3)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(batch))


def test_consecutive_blocks_are_one_event() -> None:
    events, request = KVEvents(2), spec()
    for index in range(3):
        events.stored(request, keys_of(request), index)
    stored = {
        "type": "BlockStored",
        "block_hashes": hashes(root_digest(None)),
        "parent_block_hash": None,
        "token_ids": TOKENS,
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None, None, None],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    assert on_the_wire(events) == [1.5, [stored], 3]
    assert events.take() == []


def test_a_later_block_names_its_parent() -> None:
    events, request = KVEvents(2), spec()
    events.stored(request, keys_of(request), 2)
    (event,) = on_the_wire(events)[1]  # type: ignore[index]
    first, second, third = hashes(root_digest(None))
    assert (event["parent_block_hash"], event["block_hashes"], event["token_ids"]) == (second, [third], [9, 10])
    assert first not in event["block_hashes"]


def test_salt_and_adapter_are_extra_keys_and_other_hashes() -> None:
    events, request = KVEvents(2), spec(cache_salt="mine", adapter=ADAPTER)
    for index in range(2):
        events.stored(request, keys_of(request), index)
    (event,) = on_the_wire(events)[1]  # type: ignore[index]
    assert event["extra_keys"] == [["pirate", "mine"], ["pirate"]]
    assert (event["lora_name"], event["lora_id"]) == ("pirate", lora_id(ADAPTER))
    assert event["block_hashes"] == hashes(root_digest("mine", ADAPTER.digest))[:2]
    assert not {*event["block_hashes"]} & {*hashes(root_digest(None))}


def test_removed_blocks_and_a_cleared_cache() -> None:
    events, keys = KVEvents(2), keys_of(spec())
    events.removed(keys[2])
    events.removed(keys[1])
    first, second, third = hashes(root_digest(None))
    removed = {"type": "BlockRemoved", "block_hashes": [third, second], "medium": "GPU", "group_idx": 0}
    assert on_the_wire(events) == [1.5, [removed], 3]
    events.removed(keys[0])
    events.cleared()
    assert on_the_wire(events) == [1.5, [{"type": "AllBlocksCleared"}], 3]
    assert first not in (second, third)
