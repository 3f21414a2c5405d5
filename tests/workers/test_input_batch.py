"""The arrays of a step against their definition: each token at its own position and in its own slot, however a
sequence is cut, and when it is computed again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sempre.ipc.messages import NewRequest, SamplingSpec, ScheduledRequest
from sempre.workers.input_batch import InputBatch, StepPlan
from sempre.workers.sampling import GrammarCompiler

BLOCK, LENGTH, NUM_BLOCKS = 16, 2048, 600
# chunks that begin before, at and after the ends of blocks, of tiles of 64 keys and of splits of 512
CHUNKS = (16, 17, 63, 64, 65, 511, 512, 513, 1024, LENGTH)


@dataclass
class Sequence:
    """A request as the scheduler sees it, in blocks that are neither in order nor adjacent."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    free: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0

    def next_chunk(self, size: int, drafts: tuple[int, ...] = ()) -> ScheduledRequest:
        start = len(self.table)
        count = min(size, len(self.token_ids) - self.computed)
        end = self.computed + count + len(drafts)
        added = [self.free.pop() for _ in range(-(-end // BLOCK) - start)]
        self.table += added
        return ScheduledRequest(
            request_id=self.request_id,
            num_computed_tokens=self.computed,
            num_tokens=count + len(drafts),
            block_table_start=start,
            block_ids=added,
            draft_token_ids=list(drafts),
        )

    def preempt(self) -> None:
        """Its blocks now belong to another."""
        self.table, self.computed = [], 0


def new_batch(num_slots: int = 3, *, has_states: bool = False) -> InputBatch:
    return InputBatch(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        max_model_len=LENGTH,
        num_slots=num_slots,
        grammars=GrammarCompiler(Path("none"), 10),
        has_states=has_states,
    )


def sequences(batch: InputBatch, lengths: dict[str, tuple[int, int]]) -> list[Sequence]:
    """Known to the batch; `lengths` are (tokens, prompt tokens)."""
    generator = np.random.default_rng(len(lengths))
    free = generator.permutation(NUM_BLOCKS).tolist()
    made = []
    for name, (length, num_prompt_tokens) in lengths.items():
        token_ids = generator.integers(0, 4096, length).tolist()
        batch.add(
            NewRequest(
                request_id=name,
                token_ids=token_ids,
                num_prompt_tokens=num_prompt_tokens,
                seed=0,
                params=SamplingSpec(max_tokens=50),
            )
        )
        made.append(Sequence(name, token_ids, num_prompt_tokens, free))
    return made


def end_of(item: ScheduledRequest) -> int:
    """Where the known tokens of a step end, and drafts begin."""
    return item.num_computed_tokens + item.num_tokens - len(item.draft_token_ids)


def compute(batch: InputBatch, chunks: list[tuple[Sequence, ScheduledRequest]]) -> StepPlan:
    """One step, checked row by row."""
    plan = batch.plan([item for _, item in chunks])
    rows = batch.arrays(plan)
    expected = [
        (token, position, sequence.table[position // BLOCK] * BLOCK + position % BLOCK)
        for sequence, item in chunks
        for position, token in enumerate(
            sequence.token_ids[sequence.computed : end_of(item)] + item.draft_token_ids, start=sequence.computed
        )
    ]
    found = zip(rows.token_ids.tolist(), rows.positions.tolist(), rows.slot_mapping.tolist(), strict=True)
    assert list(found) == expected
    ends = [item.num_computed_tokens + item.num_tokens for _, item in chunks]
    assert rows.context_lens.tolist() == ends
    assert rows.query_starts.tolist() == [0, *np.cumsum([item.num_tokens for _, item in chunks]).tolist()]
    for row, ((sequence, _), end) in enumerate(zip(chunks, ends, strict=True)):
        needed = -(-end // BLOCK)
        assert rows.block_tables[row, :needed].tolist() == sequence.table[:needed]
    for sequence, item in chunks:
        sequence.computed = end_of(item)
    return plan


@pytest.mark.parametrize("size", CHUNKS)
def test_every_token_of_a_chunk_has_its_own_position_and_slot(size: int) -> None:
    batch = new_batch()
    together = sequences(batch, {"long": (LENGTH, LENGTH), "short": (100, 100), "other": (1030, 1030)})
    while unfinished := [sequence for sequence in together if sequence.computed < len(sequence.token_ids)]:
        plan = compute(batch, [(sequence, sequence.next_chunk(size)) for sequence in unfinished])
        assert plan.samples.tolist() == [sequence.computed == len(sequence.token_ids) for sequence in unfinished]


@pytest.mark.parametrize("size", CHUNKS)
def test_a_request_that_is_computed_again_has_the_positions_it_had(size: int) -> None:
    """Preempted while it decodes, and nothing of it is in the cache: prompt and outputs as one, in other blocks."""
    batch = new_batch()
    kept, preempted = sequences(batch, {"kept": (40, 40), "preempted": (1020, 1020)})
    compute(batch, [(sequence, sequence.next_chunk(LENGTH)) for sequence in (kept, preempted)])
    for token in range(10):
        for sequence in (kept, preempted):
            state = batch.get(sequence.request_id)
            batch.expect(np.asarray([state.slot]))
            batch.record(state, [token])
            sequence.token_ids.append(token)
        compute(batch, [(sequence, sequence.next_chunk(1)) for sequence in (kept, preempted)])
    preempted.preempt()
    while preempted.computed < len(preempted.token_ids):
        plan = compute(batch, [(preempted, preempted.next_chunk(size))])
    assert plan.samples.tolist() == [True]


def test_a_token_is_sampled_after_the_last_known_one_and_after_each_draft() -> None:
    batch = new_batch()
    whole, cut, drafted = sequences(batch, {"whole": (20, 20), "cut": (50, 50), "drafted": (33, 30)})
    compute(batch, [(drafted, drafted.next_chunk(32))])
    chunks = [
        (whole, whole.next_chunk(20)),
        (cut, cut.next_chunk(10)),
        (drafted, drafted.next_chunk(1, drafts=(7, 8))),
    ]
    plan = compute(batch, chunks)
    rows = plan.sampled_rows
    assert rows.requests.tolist() == [0, 2, 2, 2]
    assert rows.rows.tolist() == [19, 30, 31, 32]
    assert rows.positions.tolist() == [20, 33, 34, 35]
    assert rows.offsets.tolist() == [0, 0, 1, 2]
    assert rows.starts(3).tolist() == [0, 1, 1, 4]


def test_tokens_that_are_recorded_later_are_counted_once() -> None:
    """With steps in flight the next one is built before the previous one's token is known."""
    batch = new_batch()
    (sequence,) = sequences(batch, {"a": (20, 20)})
    state = batch.get("a")
    plan = compute(batch, [(sequence, sequence.next_chunk(20))])
    batch.expect(plan.slots)
    sequence.token_ids.append(0)  # the row's contents are meaningless
    ahead = batch.plan([sequence.next_chunk(1)])
    assert ahead.samples.tolist() == [True]
    batch.record(state, [5])
    assert state.token_ids == [*sequence.token_ids[:20], 5]
    sequence.token_ids[20], sequence.computed = 5, 21
    batch.expect(ahead.slots)
    batch.record(state, [6, 7])
    sequence.token_ids += [6, 7]
    assert compute(batch, [(sequence, sequence.next_chunk(1))]).samples.tolist() == [False]
    assert compute(batch, [(sequence, sequence.next_chunk(1))]).samples.tolist() == [True]


def test_a_token_of_a_removed_request_does_not_reach_its_successor() -> None:
    batch = new_batch(num_slots=1)
    (former,) = sequences(batch, {"former": (20, 20)})
    state = batch.get("former")
    batch.expect(compute(batch, [(former, former.next_chunk(20))]).slots)
    batch.remove("former")
    (successor,) = sequences(batch, {"successor": (17, 17)})
    compute(batch, [(successor, successor.next_chunk(16))])
    batch.record(state, [5, 6])
    assert compute(batch, [(successor, successor.next_chunk(1))]).samples.tolist() == [True]


def test_states_are_read_by_requests_and_written_by_rows() -> None:
    batch = new_batch(has_states=True)
    first, second = sequences(batch, {"first": (20, 20), "second": (3, 3)})
    begun = msgspec.structs.replace(first.next_chunk(17), state_writes=[(15, 4), (16, 0)])
    plan = compute(batch, [(first, begun)])
    arrays = batch.arrays(plan)
    assert (plan.shape.has_states, arrays.state_reads.tolist()) == (True, [-1])
    assert arrays.state_writes.tolist() == [-1] * 15 + [4, 0]
    chunks = [
        (first, msgspec.structs.replace(first.next_chunk(3), state_read=0, state_writes=[(2, 0)])),
        (second, msgspec.structs.replace(second.next_chunk(2), state_writes=[(1, 1)])),
    ]
    arrays = batch.arrays(compute(batch, chunks))
    assert arrays.state_reads.tolist() == [0, -1]
    assert arrays.state_writes.tolist() == [-1, -1, 0, -1, 1]


def test_a_model_without_states_has_empty_arrays_of_them() -> None:
    batch = new_batch()
    (sequence,) = sequences(batch, {"a": (20, 20)})
    plan = compute(batch, [(sequence, sequence.next_chunk(20))])
    assert not plan.shape.has_states
    assert batch.arrays(plan).state_reads.size == batch.arrays(plan).state_writes.size == 0
