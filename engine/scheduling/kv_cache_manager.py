"""Block tables of requests: growth, prefix hits, release."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sempre.engine.scheduling.block_pool import BlockPool
from sempre.engine.scheduling.kv_events import KVEvents
from sempre.engine.scheduling.prefix_cache import BlockKey, PrefixCache
from sempre.engine.scheduling.request import Request
from sempre.engine.scheduling.state_slots import StateSlots
from sempre.ipc.messages import RequestSpec


class KVCacheManager:
    """Allocates blocks to requests and frees them.

        block_ids   | committed: full, written, findable | full or being filled | reserved |
                    0                   num_committed_blocks                    num_slots / block_size

    Only committed blocks are ever shared, so no request writes into a block that another one reads.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        states: StateSlots | None = None,
        events: KVEvents | None = None,
    ) -> None:
        """`states`: of a model whose layers keep states; a prefix is cached as far as it has both. `events` are told
        what is cached."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._events = events
        self._prefix_cache = PrefixCache(num_blocks, block_size, None if events is None else events.removed)
        self._pool = BlockPool(num_blocks, self._prefix_cache)
        self.states = states

    @property
    def usage(self) -> float:
        """Fraction of all blocks held by requests, 0…1."""
        return self._pool.num_used / self.num_blocks

    def find_cached_blocks(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix of a waiting request.

        Never includes the last token, which must be computed to sample the next one.
        """
        if not (self.enable_prefix_caching and request.reads_prefix_cache):
            return []
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        self._extend_keys(request, num_blocks)
        blocks = []
        for key in request.block_keys[:num_blocks]:
            block = self._prefix_cache.find(key)
            if block is None:
                break
            blocks.append(block)
        if self.states is not None:
            request.num_matching_tokens = len(blocks) * self.block_size
            del blocks[self.states.num_resumable_blocks(request.block_keys[: len(blocks)]) :]
        return blocks

    def num_cached_tokens(self, spec: RequestSpec, keys: list[BlockKey]) -> int:
        """How long a prefix of a new request is cached, if it may be read.

        `keys` are those of its first blocks, which are added as far as they are looked up: the caches of all replicas
        have the same for the same content.
        """
        token_ids = [*spec.prompt_token_ids, *spec.output_token_ids]
        most = (len(token_ids) - 1) // self.block_size if self.enable_prefix_caching else 0
        adapter = None if spec.adapter is None else spec.adapter.digest
        count = 0
        while count < most:
            if count == len(keys):
                self._prefix_cache.extend_keys(keys, token_ids, count + 1, spec.cache_salt, adapter)
            if self._prefix_cache.find(keys[count]) is None:
                break
            count += 1
        if self.states is not None:
            count = self.states.num_resumable_blocks(keys[:count])
        return count * self.block_size

    def can_admit(self, request: Request, cached_blocks: Sequence[int]) -> bool:
        """Whether all tokens of the request fit now, not only its first chunk, so that it is not preempted at once."""
        if self.states is not None and not self.states.can_admit(_last_key(request, cached_blocks)):
            return False
        num_new = -(-request.num_tokens // self.block_size) - len(cached_blocks)
        return num_new <= self._pool.num_available - self._pool.num_cached(cached_blocks)

    def admit(self, request: Request, cached_blocks: Sequence[int], num_tokens: int) -> None:
        """Give a waiting request its cached blocks and blocks for its first `num_tokens` tokens."""
        self._pool.acquire(cached_blocks)
        request.block_ids = [*cached_blocks]
        request.num_slots = len(cached_blocks) * self.block_size
        request.num_computed_tokens = request.num_slots
        request.num_committed_blocks = len(cached_blocks)
        request.next_commit_at = request.num_slots + self.block_size if self.enable_prefix_caching else sys.maxsize
        if self.states is not None:
            self.states.admit(request, _last_key(request, cached_blocks))
        if self.grow(request, num_tokens) is None:
            raise AssertionError("admitted without room")

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Add blocks for the request's first `num_tokens` tokens and return them; None if too few are available."""
        num_new = -(-num_tokens // self.block_size) - len(request.block_ids)
        if num_new > self._pool.num_available:
            return None
        blocks = self._pool.allocate(num_new)
        request.block_ids += blocks
        request.num_slots = len(request.block_ids) * self.block_size
        return blocks

    def commit(self, request: Request, num_written_tokens: int, sampled: Sequence[int] = ()) -> None:
        """Add the blocks that [0, num_written_tokens) fills to the prefix cache; `sampled` are tokens not yet appended
        to the request.

        Called when the step that wrote them has returned, not when it is planned, so a step that fails, as a whole or
        for this request, never leaves a findable block without content.
        """
        num_full = num_written_tokens // self.block_size
        self._extend_keys(request, num_full, sampled)
        for index in range(request.num_committed_blocks, num_full):
            is_new = self._prefix_cache.insert(request.block_keys[index], request.block_ids[index])
            if is_new and self._events is not None:
                self._events.stored(request.spec, request.block_keys, index)
        request.num_committed_blocks = num_full
        request.next_commit_at = (num_full + 1) * self.block_size
        if self.states is not None:
            self.states.commit(request, num_written_tokens)

    def release(self, request: Request) -> None:
        """Free all blocks; committed ones stay findable until they are needed."""
        self._pool.release(request.block_ids)
        request.block_ids = []
        request.num_slots = 0
        request.num_computed_tokens = 0
        request.num_committed_blocks = 0
        if self.states is not None:
            self.states.release(request)

    def forget_cached(self) -> None:
        """Empty the prefix cache; no request may hold a block."""
        assert not self._pool.num_used
        self._pool.forget_cached()
        if self._events is not None:
            self._events.cleared()
        if self.states is not None:
            self.states.forget_snapshots()

    def check_invariants(self, running: Sequence[Request]) -> None:
        """Raise AssertionError unless pool, prefix cache and the running requests' block tables agree."""
        self._pool.check_invariants([request.block_ids for request in running])
        self._prefix_cache.check_invariants()
        if self.states is not None:
            self.states.check_invariants(running)
        holders: dict[int, int] = {}
        for request in running:
            assert request.num_slots == len(request.block_ids) * self.block_size
            assert request.num_committed_blocks * self.block_size <= request.num_computed_tokens <= request.num_slots
            for index, block in enumerate(request.block_ids):
                assert holders.setdefault(block, index) == index, "one block at two positions"
                uncommitted = index >= request.num_committed_blocks
                assert not (uncommitted and self._prefix_cache.holds(block)), "findable before it is written"
                assert not (uncommitted and self._pool.is_shared(block)), "shared before it is full"

    def _extend_keys(self, request: Request, num_blocks: int, sampled: Sequence[int] = ()) -> None:
        if num_blocks > len(request.block_keys):
            salt = request.spec.cache_salt
            token_ids = request.token_ids
            if num_blocks * self.block_size > len(token_ids):
                token_ids = [*token_ids, *sampled]
            self._prefix_cache.extend_keys(request.block_keys, token_ids, num_blocks, salt, request.adapter)


def _last_key(request: Request, cached_blocks: Sequence[int]) -> BlockKey | None:
    """The key of the last cached block of a request, if any."""
    return request.block_keys[len(cached_blocks) - 1] if cached_blocks else None
