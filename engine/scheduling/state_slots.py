"""Slots of states, for models with layers that fold a sequence into memory of fixed size.

A slot holds the state of one sequence after one of its tokens. A state says nothing of the tokens before, so a sequence
can only go on where a state was kept: a cached prefix is worth as much as reaches its last snapshot.

    own        of a running request: its steps read and overwrite it
    undecided  of a step in flight whose result decides: the state after each token that is being verified, or after a
               token that may have to be computed again; one becomes the own slot, the others are free again
    snapshot   the state after a number of whole blocks, found by the key of the last of them; never overwritten while
               it can be found, or a step that reads it may still be planned

Snapshots are taken where they cost no more than a slot: at the last whole block of each piece of a prompt, where a
prompt leaves what it shares with earlier ones, and at each whole block of generated tokens. Of the last kind, and of
pieces of one prompt, only a request's latest is worth keeping: the one before is the first to be evicted.
A request that runs out of slots takes no snapshot; so many are left that `max_num_seqs` requests can have their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sempre.engine.scheduling.block_pool import BlockPool
from sempre.engine.scheduling.prefix_cache import BlockKey, PrefixCache
from sempre.engine.scheduling.request import HeldSlots, Request


class StateAccess(NamedTuple):
    """What a request of a step reads and writes, see `ScheduledRequest`."""

    read: int = -1
    writes: tuple[tuple[int, int], ...] = ()


class StateSlots:
    """Gives slots to requests and takes them back; with `max_num_seqs` slots there is one for each running request."""

    def __init__(self, *, num_slots: int, max_num_seqs: int, block_size: int, takes_snapshots: bool) -> None:
        assert num_slots >= max_num_seqs
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._takes_snapshots = takes_snapshots
        self._snapshots = PrefixCache(num_slots, block_size)
        self._pool = BlockPool(num_slots, self._snapshots)
        self._num_holders = 0
        # snapshots that the step under construction reads: they may be evicted by the next one
        self._read_now: list[int] = []

    @property
    def usage(self) -> float:
        """Fraction of all slots held by requests, 0…1."""
        return self._pool.num_used / self._pool.num_blocks

    @property
    def num_spare(self) -> int:
        """How many slots may serve other purposes than a running request's own."""
        return max(0, self._pool.num_available - (self._max_num_seqs - self._num_holders))

    # A request begins and ends

    def num_resumable_blocks(self, keys: Sequence[BlockKey]) -> int:
        """Of a prefix with these keys: how many blocks there are up to its last snapshot."""
        for count in range(len(keys), 0, -1):
            if self._snapshots.find(keys[count - 1]) is not None:
                return count
        return 0

    def can_admit(self, last_key: BlockKey | None) -> bool:
        """Whether a request can have its own slot beside the snapshot that it resumes from."""
        snapshot = [] if last_key is None else [self._snapshot(last_key)]
        return self._pool.num_available > self._pool.num_cached(snapshot)

    def admit(self, request: Request, last_key: BlockKey | None) -> None:
        """Give the request its own slot; its first step reads the snapshot of `last_key`, if any."""
        request.slots = held = HeldSlots()
        if last_key is not None:
            held.snapshot = self._snapshot(last_key)
            self._pool.acquire([held.snapshot])
        (held.own,) = self._pool.allocate(1)
        self._num_holders += 1

    def release(self, request: Request) -> None:
        """Free all slots of a request; snapshots that can be found stay until they are needed."""
        if request.slots is not None:
            self._pool.release(list(request.slots.all()))
            request.slots = None
            self._num_holders -= 1

    # A step

    def plan(self, request: Request, num_tokens: int, num_drafts: int, *, keeps_last: bool) -> StateAccess:
        """Slots for the next `num_tokens` tokens of a request, and for drafts after them.

        `keeps_last`: the last token may have to be computed again, so the state before it is kept if there is room.
        """
        held = request.slots
        assert held is not None
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        read = -1 if not start else held.own if held.snapshot < 0 else held.snapshot
        if num_drafts:
            held.undecided = [(end, held.own), *self._allocate(end + 1, num_drafts)]
        elif keeps_last and self.num_spare:
            held.undecided = self._allocate(end, 1)
        decided = end - 1 if held.undecided and not num_drafts else end
        writes = dict(held.undecided)
        kept = -1
        for at in self._snapshots_within(request, start, decided if not num_drafts else decided - 1):
            if self.num_spare:
                (slot,) = self._pool.allocate(1)
                held.new_snapshots.append((at, slot))
                writes[at] = slot
                kept = slot if at == decided else -1
        if decided > start:
            writes.setdefault(decided, held.own)
            if held.snapshot >= 0:
                self._read_now.append(held.snapshot)
            held.snapshot = kept
            if kept >= 0:
                self._pool.acquire([kept])
        return StateAccess(read, tuple((at - 1 - start, slot) for at, slot in sorted(writes.items())))

    def end_step(self) -> None:
        """All requests of the step under construction are planned."""
        self._pool.release(self._read_now)
        self._read_now = []

    def _allocate(self, first: int, count: int) -> list[tuple[int, int]]:
        return list(enumerate(self._pool.allocate(count), first))

    def _snapshots_within(self, request: Request, start: int, end: int) -> list[int]:
        """Lengths in (start, end] after which a snapshot is worth a slot, ascending."""
        if not self._takes_snapshots:
            return []
        lengths = {end // self._block_size * self._block_size, request.num_matching_tokens}
        return [length for length in sorted(lengths) if start < length <= end and not self._is_known(request, length)]

    def _is_known(self, request: Request, length: int) -> bool:
        index = length // self._block_size - 1
        return index < len(request.block_keys) and self._snapshots.find(request.block_keys[index]) is not None

    # Its result

    def decide(self, request: Request, num_written: int) -> None:
        """The request has `num_written` tokens: of the undecided slots, the one of that many becomes its own."""
        held = request.slots
        assert held is not None
        if not held.undecided:
            return
        undecided, held.undecided = held.undecided, []
        kept = dict(undecided).get(num_written)
        if kept is None:
            # its last token is computed again, from the state before it
            self._pool.release([slot for _, slot in undecided])
            return
        if held.snapshot >= 0:
            self._pool.release([held.snapshot])
            held.snapshot = -1
        rest = [slot for slot in dict.fromkeys([held.own, *(slot for _, slot in undecided)]) if slot != kept]
        if self._takes_snapshots:
            for length, slot in undecided:
                if length < num_written and length % self._block_size == 0:
                    rest.remove(slot)
                    held.new_snapshots.append((length, slot))
            if num_written % self._block_size == 0 and rest:
                held.new_snapshots.append((num_written, kept))
                self._pool.acquire([kept])
                held.snapshot, kept = kept, rest.pop(0)
        held.own = kept
        self._pool.release(rest)

    def commit(self, request: Request, num_written: int) -> None:
        """Make findable the snapshots of at most `num_written` tokens, which are written; their blocks have keys."""
        held = request.slots
        assert held is not None
        while held.new_snapshots and held.new_snapshots[0][0] <= num_written:
            length, slot = held.new_snapshots.pop(0)
            key = request.block_keys[length // self._block_size - 1]
            self._snapshots.insert(key, slot)
            self._pool.release([slot])
            if request.passing_snapshot is not None:
                self._evict_soon(request.passing_snapshot)
            request.passing_snapshot = None if self._is_lasting(request, length) else key

    def _is_lasting(self, request: Request, length: int) -> bool:
        """Whether a snapshot may help another request than one that continues this one."""
        end_of_prompt = (request.num_prompt_tokens - 1) // self._block_size * self._block_size
        return length in (end_of_prompt, request.num_matching_tokens)

    def _evict_soon(self, key: BlockKey) -> None:
        slot = self._snapshots.find(key)
        if slot is not None:
            self._pool.evict_first(slot)

    def _snapshot(self, key: BlockKey) -> int:
        slot = self._snapshots.find(key)
        assert slot is not None
        return slot

    # The worker has died; checks

    def forget_snapshots(self) -> None:
        """No request may hold a slot."""
        assert not self._pool.num_used
        self._pool.forget_cached()

    def check_invariants(self, running: Iterable[Request]) -> None:
        """Raise AssertionError unless pool, snapshots and the slots of running requests agree."""
        held = [request.slots for request in running if request.slots is not None]
        assert len(held) == self._num_holders
        self._pool.check_invariants([list(slots.all()) for slots in held])
        self._snapshots.check_invariants()
        written = [slot for slots in held for slot in slots.writable()]
        assert len(set(written)) == len(written), "two owners of one slot"
        assert not any(self._snapshots.holds(slot) for slot in written), "a snapshot that is overwritten"
        assert not self._read_now
