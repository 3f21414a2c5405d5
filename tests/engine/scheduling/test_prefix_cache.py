"""Keys of blocks, and the two maps between content and block."""

from __future__ import annotations

import hashlib

import pytest

from sempre.engine.scheduling.prefix_cache import BlockKey, PrefixCache, root_digest


def keys_of(token_ids: list[int], block_size: int = 4, cache_salt: str | None = None) -> list[BlockKey]:
    keys: list[BlockKey] = []
    PrefixCache(1, block_size).extend_keys(keys, token_ids, len(token_ids) // block_size, cache_salt)
    return keys


def test_keys_are_the_documented_bytes() -> None:
    first, second = keys_of([1, 2**31 - 1, 258, 0, 9, 9])[:1] + keys_of([1, 2, 3, 4, 5, 6, 7, 8])[1:]
    packed = bytes.fromhex("01000000ffffff7f0201000000000000")
    assert first == BlockKey(hashlib.sha256(bytes(32) + packed).digest(), packed)
    parent = keys_of([1, 2, 3, 4])[0].digest
    assert second.digest == hashlib.sha256(parent + second.packed_tokens).digest()


def test_equal_blocks_after_different_prefixes_differ() -> None:
    one, other = keys_of([1, 1, 1, 1, 5, 5, 5, 5]), keys_of([2, 2, 2, 2, 5, 5, 5, 5])
    assert one[1].packed_tokens == other[1].packed_tokens
    assert one[1].digest != other[1].digest


def test_keys_do_not_depend_on_how_they_were_extended() -> None:
    token_ids = list(range(32))
    cache = PrefixCache(1, 4)
    keys: list[BlockKey] = []
    for num_blocks in (1, 1, 5, 8):
        cache.extend_keys(keys, token_ids, num_blocks, "salt")
    assert keys == keys_of(token_ids, cache_salt="salt")


def test_salts_separate_all_blocks() -> None:
    token_ids = list(range(8))
    digests = [key.digest for salt in (None, "", "a", "b") for key in keys_of(token_ids, cache_salt=salt)]
    assert len(set(digests)) == 8
    assert len(root_digest("any length of salt")) == 32


def test_a_hit_needs_equal_tokens_not_only_an_equal_digest() -> None:
    (key,) = keys_of([1, 2, 3, 4])
    cache = PrefixCache(2, 4)
    cache.insert(key, 1)
    assert cache.find(key) == 1
    assert cache.find(BlockKey(key.digest, bytes(16))) is None


def test_the_first_block_with_a_content_stays_its_entry() -> None:
    (key,) = keys_of([1, 2, 3, 4])
    cache = PrefixCache(3, 4)
    cache.insert(key, 1)
    cache.insert(key, 2)
    assert (cache.find(key), cache.holds(1), cache.holds(2)) == (1, True, False)
    cache.remove(1)
    assert (cache.find(key), cache.holds(1)) == (None, False)
    cache.check_invariants()
    with pytest.raises(AssertionError):
        cache.remove(1)
