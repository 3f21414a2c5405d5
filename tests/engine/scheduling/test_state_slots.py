"""Slots of states: who owns them, which snapshots are taken and found, and which go first."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.scheduling import Limits
from sempre.engine.scheduling.kv_cache_manager import KVCacheManager
from sempre.engine.scheduling.request import Request
from sempre.engine.scheduling.state_slots import StateAccess, StateSlots
from sempre.ipc.messages import RequestSpec, SamplingSpec

BLOCK = 4


class Replica:
    """The caches of one replica, and requests that are planned and answered by hand."""

    def __init__(self, num_slots: int, *, max_num_seqs: int = 2, takes_snapshots: bool = True) -> None:
        self.slots = StateSlots(
            num_slots=num_slots, max_num_seqs=max_num_seqs, block_size=BLOCK, takes_snapshots=takes_snapshots
        )
        self.cache = KVCacheManager(
            num_blocks=64, block_size=BLOCK, enable_prefix_caching=takes_snapshots, states=self.slots
        )
        self.limits = Limits(100, 64, BLOCK, max_num_seqs, 64, num_state_slots=num_slots)
        self.running: list[Request] = []

    def begin(self, prompt: list[int], **params: Any) -> Request | None:
        """Admit a request; None if it does not fit."""
        name = f"r{len(self.running)}"
        spec = RequestSpec(
            request_id=name, prompt_token_ids=prompt, params=SamplingSpec(max_tokens=50, **params), seed=0, ordinal=0
        )
        request = Request(spec, 0, self.limits)
        cached = self.cache.find_cached_blocks(request)
        if not self.cache.can_admit(request, cached):
            return None
        self.cache.admit(request, cached, len(prompt))
        self.running.append(request)
        return request

    def plan(self, request: Request, count: int, drafts: int = 0, *, keeps_last: bool = False) -> StateAccess:
        access = self.slots.plan(request, count, drafts, keeps_last=keeps_last)
        self.slots.end_step()
        request.num_computed_tokens += count
        self.check()
        return access

    def answer(self, request: Request, sampled: list[int], written: int) -> None:
        """The result of the request's only step in flight."""
        request.token_ids += sampled
        request.num_tokens = len(request.token_ids)
        self.cache.grow(request, request.num_tokens)
        request.num_computed_tokens = written
        self.slots.decide(request, written)
        self.cache.commit(request, written)
        self.check()

    def end(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.release(request)
        self.check()

    def check(self) -> None:
        self.cache.check_invariants(self.running)


def resumed_from(replica: Replica, prompt: list[int]) -> int:
    """Tokens of a prompt that would not be computed."""
    request = replica.begin(prompt)
    assert request is not None
    count = request.num_computed_tokens
    replica.end(request)
    return count


PROMPT = list(range(10))


def test_a_prompt_leaves_its_last_whole_block_and_goes_on_in_its_own_slot() -> None:
    replica = Replica(6)
    request = replica.begin(PROMPT)
    assert request is not None
    assert request.slots is not None
    own = request.slots.own
    access = replica.plan(request, 10)
    assert (access.read, access.writes[1]) == (-1, (9, own))
    ((index, snapshot),) = access.writes[:1]
    assert (index, snapshot != own) == (7, True)
    replica.answer(request, [50], 10)
    assert replica.plan(request, 1) == StateAccess(own, ((0, own),))
    replica.answer(request, [51], 11)
    replica.end(request)
    assert resumed_from(replica, [*PROMPT[:9], 99]) == 8
    again = replica.begin(PROMPT)
    assert again is not None
    assert again.slots is not None
    assert replica.plan(again, 2) == StateAccess(snapshot, ((1, again.slots.own),))


def test_a_state_after_a_whole_block_is_a_snapshot_without_a_second_write() -> None:
    replica = Replica(6)
    request = replica.begin(PROMPT[:8])
    assert request is not None
    assert request.slots is not None
    ((index, snapshot),) = replica.plan(request, 8).writes
    own = request.slots.own
    assert (index, snapshot != own) == (7, True)
    replica.answer(request, [50], 8)
    # it is read once, and never written again
    assert replica.plan(request, 1) == StateAccess(snapshot, ((0, own),))
    replica.answer(request, [51], 9)
    assert replica.plan(request, 1).read == own


def test_what_prompts_share_is_kept_when_the_second_one_leaves_it() -> None:
    replica = Replica(8)
    shared, tails = PROMPT[:8], [[20 + 10 * index + i for i in range(6)] for index in range(3)]
    for index, tail in enumerate(tails):
        request = replica.begin([*shared, *tail])
        assert request is not None
        # keys and values of the first are found, but no state at their end; the second one leaves it
        assert request.num_computed_tokens == (8 if index == 2 else 0)
        replica.plan(request, 14 - request.num_computed_tokens)
        replica.answer(request, [50], 14)
        replica.end(request)


def test_a_snapshot_is_found_only_after_the_step_that_wrote_it_has_returned() -> None:
    replica = Replica(8)
    first = replica.begin(PROMPT)
    assert first is not None
    replica.plan(first, 10)
    assert resumed_from(replica, PROMPT) == 0
    replica.answer(first, [50], 10)
    assert resumed_from(replica, PROMPT) == 8


def test_the_result_of_one_chunk_says_nothing_of_the_next_ones_snapshot() -> None:
    replica = Replica(8)
    prompt = list(range(14))
    request = replica.begin(prompt)
    assert request is not None
    replica.plan(request, 6)
    replica.plan(request, 8)
    replica.cache.commit(request, 6)
    assert replica.slots.num_resumable_blocks(request.block_keys) == 1
    replica.cache.commit(request, 14)
    assert replica.slots.num_resumable_blocks(request.block_keys) == 3


def test_a_snapshot_that_a_step_reads_is_not_overwritten_by_the_same_step() -> None:
    replica = Replica(3)
    former = replica.begin(PROMPT)
    assert former is not None
    replica.plan(former, 10)
    replica.answer(former, [50], 10)
    replica.end(former)
    reader, writer = replica.begin(PROMPT), replica.begin([77, *PROMPT])
    assert reader is not None
    assert writer is not None
    reads = replica.slots.plan(reader, 2, 0, keeps_last=False)
    writes = replica.slots.plan(writer, 11, 0, keeps_last=False)
    assert reads.read >= 0
    assert reads.read not in dict(writes.writes).values()
    replica.slots.end_step()
    # the next step may
    assert reads.read in dict(replica.slots.plan(writer, 5, 0, keeps_last=False).writes).values()


def test_of_drafts_the_accepted_one_leaves_its_state_and_the_others_nothing() -> None:
    replica = Replica(8)
    request = replica.begin(PROMPT)
    assert request is not None
    assert request.slots is not None
    replica.plan(request, 10)
    replica.answer(request, [50], 10)
    own = request.slots.own
    access = replica.plan(request, 1, 3)
    assert access.read == own
    assert [index for index, _ in access.writes] == [0, 1, 2, 3]
    assert access.writes[0] == (0, own)
    replica.answer(request, [51, 52, 53], 13)
    # 12 tokens are three blocks: that row's state is a snapshot, the next one's goes on
    assert request.slots.own == access.writes[2][1]
    assert resumed_from(replica, [*PROMPT, 50, 51, 99]) == 12
    assert replica.plan(request, 1).read == access.writes[2][1]


def test_all_drafts_rejected_at_the_end_of_a_block() -> None:
    replica = Replica(8)
    request = replica.begin([*PROMPT, 10])
    assert request is not None
    replica.plan(request, 11)
    replica.answer(request, [50], 11)
    access = replica.plan(request, 1, 2)
    replica.answer(request, [51], 12)
    assert request.slots is not None
    assert replica.plan(request, 1) == StateAccess(access.writes[0][1], ((0, request.slots.own),))
    assert request.slots.own != access.writes[0][1]


def test_a_token_that_is_computed_again_starts_from_the_state_before_it() -> None:
    replica = Replica(8)
    request = replica.begin(PROMPT, grammar="start: /.*/")
    assert request is not None
    assert request.slots is not None
    own = request.slots.own
    first = replica.plan(request, 10, keeps_last=True)
    assert [index for index, _ in first.writes] == [7, 8, 9]
    assert first.writes[1][1] == own
    for _ in range(2):
        replica.slots.decide(request, 9)
        request.num_computed_tokens = 9
        again = replica.plan(request, 1, keeps_last=True)
        assert again.read == own
        assert again.writes[0][1] != own
    replica.answer(request, [50], 10)
    assert replica.plan(request, 1, keeps_last=True).read == again.writes[0][1]


def test_slots_of_requests_come_before_everything_else() -> None:
    """With one slot for each request there is no snapshot, no draft, and nothing to compute again from."""
    replica = Replica(2)
    first = replica.begin(PROMPT, grammar="start: /.*/")
    assert first is not None
    assert first.slots is not None
    assert replica.slots.num_spare == 0
    assert replica.plan(first, 10, keeps_last=True).writes == ((9, first.slots.own),)
    assert not first.slots.undecided
    replica.answer(first, [50], 10)
    second = replica.begin([*PROMPT[:8], 70])
    assert second is not None
    assert second.num_computed_tokens == 0
    assert replica.begin([1]) is None


def test_a_request_waits_where_its_snapshot_would_take_the_last_slot() -> None:
    replica = Replica(3, max_num_seqs=2)
    request = replica.begin(PROMPT)
    assert request is not None
    replica.plan(request, 10)
    replica.answer(request, [50], 10)
    replica.end(request)
    first, second = replica.begin(PROMPT), None
    assert first is not None
    # the snapshot is being read, and one slot is left: the second request shares the one and takes the other
    second = replica.begin(PROMPT)
    assert second is not None
    assert first.num_computed_tokens == second.num_computed_tokens == 8


def test_a_passing_snapshot_goes_before_those_that_last() -> None:
    replica = Replica(5, max_num_seqs=1)
    request = replica.begin(PROMPT[:9])
    assert request is not None
    replica.plan(request, 9)
    replica.answer(request, [9], 9)
    for token in range(10, 22):
        replica.plan(request, 1)
        replica.answer(request, [token], token)
    replica.end(request)
    known = list(range(22))
    assert resumed_from(replica, known) == 20
    # four more snapshots: the passing ones of 12 and 16 tokens go first, then the oldest
    for index in range(2):
        other = replica.begin([50 + 10 * index + i for i in range(6)])
        assert other is not None
        replica.plan(other, 6)
        replica.answer(other, [90], 6)
        replica.end(other)
    assert resumed_from(replica, known) == 20
    assert resumed_from(replica, [*known[:9], 99]) == 8
    assert resumed_from(replica, [*known[:17], 99]) == 8


@pytest.mark.parametrize("takes_snapshots", [True, False])
def test_nothing_is_left_after_all_have_ended(takes_snapshots: bool) -> None:
    replica = Replica(5, takes_snapshots=takes_snapshots)
    requests = [replica.begin([index, *PROMPT]) for index in range(2)]
    for request in requests:
        assert request is not None
        access = replica.plan(request, 11)
        assert len(access.writes) == (2 if takes_snapshots else 1)
    replica.check()
    assert replica.slots.usage == (0.8 if takes_snapshots else 0.4)
    for request in requests:
        assert request is not None
        replica.end(request)
    assert replica.slots.usage == 0
    replica.slots.forget_snapshots()
