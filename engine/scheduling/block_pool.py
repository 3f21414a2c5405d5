"""Reference counts of KV cache blocks, the free ones, and the order in which reusable contents are evicted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from sempre.engine.scheduling.prefix_cache import PrefixCache


class BlockPool:
    """Every block is in exactly one state:

    used    reference count ≥ 1
    cached  count 0, content still in the prefix cache; evicted in the order of release when needed
    free    count 0, no useful content
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # insertion order is a logical clock of last use: total, and the same in every run
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Number of blocks that `allocate` can return: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def num_cached(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are available now but would not be once acquired."""
        return sum(not self._ref_counts[block] for block in blocks)

    def is_shared(self, block: int) -> bool:
        return self._ref_counts[block] > 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks with one reference each: free ones first, then the least recently used.

        The caller must check `count <= num_available`.
        """
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._prefix_cache.remove(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """Add a reference to blocks found in the prefix cache."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a block table, the last first: a tail is useless without its head."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._prefix_cache.holds(block):
                self._cached[block] = None
            else:
                self._free.append(block)

    def evict_first(self, block: int) -> None:
        """Make a block that holds a content the next to be evicted, unless it is in use."""
        if not self._ref_counts[block]:
            self._cached.move_to_end(block, last=False)

    def forget_cached(self) -> None:
        """Make every cached block free."""
        while self._cached:
            block, _ = self._cached.popitem(last=False)
            self._prefix_cache.remove(block)
            self._free.append(block)

    def check_invariants(self, block_tables: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless the states are disjoint, complete, and agree with the given block tables."""
        counts = [0] * self.num_blocks
        for table in block_tables:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts
        used = [block for block, count in enumerate(counts) if count]
        assert sorted([*used, *self._cached, *self._free]) == list(range(self.num_blocks))
        assert all(self._prefix_cache.holds(block) for block in self._cached)
        assert not any(self._prefix_cache.holds(block) for block in self._free)
