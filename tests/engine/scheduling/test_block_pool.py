"""Reference counts, reuse and eviction of blocks, and the check that must notice when they are wrong."""

from __future__ import annotations

import pytest

from sempre.engine.scheduling.block_pool import BlockPool
from sempre.engine.scheduling.prefix_cache import BlockKey, PrefixCache


def pool_of(num_blocks: int) -> tuple[BlockPool, PrefixCache]:
    cache = PrefixCache(num_blocks, block_size=1)
    return BlockPool(num_blocks, cache), cache


def key(name: int) -> BlockKey:
    return BlockKey(bytes([name] * 32), bytes([name] * 4))


def test_a_shared_block_is_given_back_by_its_last_holder() -> None:
    pool, cache = pool_of(3)
    table = pool.allocate(2)
    cache.insert(key(1), table[0])
    pool.acquire(table[:1])
    assert pool.is_shared(table[0])
    pool.release(table)
    assert (pool.num_available, pool.num_used) == (2, 1)
    pool.release(table[:1])
    assert (pool.num_available, pool.num_cached(table[:1])) == (3, 1)
    pool.check_invariants([])


def test_free_blocks_are_taken_before_contents_and_contents_in_the_order_of_release() -> None:
    pool, cache = pool_of(4)
    first, second = pool.allocate(2), pool.allocate(1)
    for block in (*first, *second):
        cache.insert(key(block), block)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(4) == [3, *second, *reversed(first)]
    assert len(cache) == 0


def test_a_found_content_is_used_last_again() -> None:
    pool, cache = pool_of(2)
    for block in pool.allocate(2):
        cache.insert(key(block), block)
        pool.release([block])
    pool.acquire([0])
    pool.release([0])
    assert pool.allocate(1) == [1]


def test_forget_cached_frees_everything() -> None:
    pool, cache = pool_of(2)
    for block in pool.allocate(2):
        cache.insert(key(block), block)
        pool.release([block])
    pool.forget_cached()
    assert (len(cache), pool.num_available) == (0, 2)
    pool.check_invariants([])


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [1]], [[0, 2]]])
def test_the_check_notices_wrong_block_tables(tables: list[list[int]]) -> None:
    pool, _ = pool_of(3)
    assert pool.allocate(2) == [0, 1]
    pool.check_invariants([[0, 1]])
    with pytest.raises(AssertionError):
        pool.check_invariants(tables)
