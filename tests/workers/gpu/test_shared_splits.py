"""Which requests of a GPU's decode step hold the same blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")

from sempre.workers.gpu import shared_splits
from sempre.workers.gpu.shared_splits import SPLIT, SharedSplits

BLOCK_SIZE = 64
PER_SPLIT = SPLIT // BLOCK_SIZE
SLOTS, WIDTH = 6, 4 * PER_SPLIT + 3
Table = npt.NDArray[np.int32]

# the contents of a request's splits, and tokens after them; a request comes at a slot, grows, or goes
CONTENTS = st.text("ab", max_size=4)
REQUEST = st.tuples(CONTENTS, st.integers(0, 3))
CHANGES = st.lists(st.tuples(st.integers(0, SLOTS + 1), st.none() | REQUEST), max_size=25)


@pytest.fixture(autouse=True)
def _any_saving_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_splits, "LEAST_SAVED", 1)


class _Requests:
    """Tables as a worker keeps them, beside what is tested."""

    def __init__(self) -> None:
        self.splits = SharedSplits(num_slots=SLOTS, table_width=WIDTH, block_size=BLOCK_SIZE)
        self.tables: Table = np.zeros((SLOTS + 2, WIDTH), np.int32)
        self.contexts: dict[int, int] = {}

    def change(self, slot: int, request: tuple[str, int] | None) -> None:
        if request is None:
            self.contexts.pop(slot, None)
            self.splits.remove(slot)
            return
        contents, rest = request
        numbers = [ord(letter) * 100 + at for at, letter in enumerate(contents)]
        blocks = [PER_SPLIT * number + index for number in numbers for index in range(PER_SPLIT)]
        blocks += [-1000 * slot - index for index in range(rest)]
        self.tables[slot, : len(blocks)] = blocks
        # as a prompt's chunks bring them
        middle = len(blocks) // 2
        for start, end in ((0, middle), (middle, len(blocks))):
            self.splits.extend(slot, self.tables[slot], start, end)
        self.contexts[slot] = len(contents) * SPLIT + 1 if rest else len(contents) * SPLIT

    def step(self, padding: int = 0) -> shared_splits.StepPrefixes | None:
        slots = np.asarray(sorted(self.contexts), np.int64)
        contexts = np.asarray([self.contexts[slot] for slot in slots.tolist()], np.int64)
        return self.splits.of_step(slots, contexts, len(slots) + padding, 4 * SPLIT + 1)

    def expected(self) -> dict[int, int]:
        """How many leading splits of each request another one shares, each of whose earlier splits are shared."""
        counts, before = dict.fromkeys(self.contexts, 4), {}
        while counts != before:
            before = dict(counts)
            for slot in counts:
                shared = (any(o != slot and before[o] > s for o in self.like(slot, s)) for s in range(before[slot]))
                counts[slot] = len(list(takewhile(bool, shared)))
        return counts

    def like(self, slot: int, split: int) -> Iterator[int]:
        """Requests with the same blocks there, all of whose keys they see."""
        span = slice(split * PER_SPLIT, (split + 1) * PER_SPLIT)
        for other, context in self.contexts.items():
            whole = min(context, self.contexts[slot]) >= (split + 1) * SPLIT
            if whole and (self.tables[other, span] == self.tables[slot, span]).all():
                yield other


@given(CHANGES, st.integers(0, 2))
def test_tiles_hold_equal_blocks_and_miss_none(changes: list[tuple[int, tuple[str, int] | None]], padding: int) -> None:
    requests = _Requests()
    for slot, request in changes:
        requests.change(slot, request)
    if not requests.contexts:
        return
    found = requests.step(padding)
    slots = sorted(requests.contexts)
    counts = [0] * len(slots) if found is None else found.arrays.counts[: len(slots)].tolist()
    assert dict(zip(slots, counts, strict=True)) == requests.expected()
    if found is not None:
        arrays = found.arrays
        for split, first, count in arrays.tiles[: arrays.num_tiles[0]].tolist():
            members = [slots[row] for row in arrays.requests[first : first + count].tolist()]
            assert set(members) <= set(requests.like(members[0], split))


def test_a_step_like_the_last_sends_nothing() -> None:
    requests = _Requests()
    for slot in range(3):
        requests.change(slot, ("ab", 1))
    first = requests.step()
    assert first is not None
    assert first.is_new
    again = requests.step()
    assert again is not None
    assert not again.is_new
    assert again.arrays is first.arrays
    requests.change(2, ("a", 1))
    changed = requests.step()
    assert changed is not None
    assert changed.is_new
    assert changed.arrays.counts.tolist() == [2, 2, 1]
    padded = requests.step(padding=1)
    assert padded is not None
    assert padded.is_new
    assert padded.arrays.counts.tolist() == [2, 2, 1, 0]


def test_nothing_is_shared_once_the_others_have_gone() -> None:
    requests = _Requests()
    for slot in range(2):
        requests.change(slot, ("ab", 1))
    assert requests.step() is not None
    requests.change(1, None)
    assert requests.step() is None
    # numbers are used again
    requests.change(1, ("b", 1))
    requests.change(0, ("b", 2))
    found = requests.step()
    assert found is not None
    assert found.arrays.counts.tolist() == [1, 1]


def test_a_split_that_ends_after_the_context_is_not_shared() -> None:
    requests = _Requests()
    for slot in range(2):
        requests.change(slot, ("ab", 1))
    requests.contexts[1] = 2 * SPLIT - 1
    found = requests.step()
    assert found is not None
    assert found.arrays.counts.tolist() == [1, 1]


def test_blocks_that_differ_later_are_not_shared() -> None:
    requests = _Requests()
    for slot in range(2):
        requests.change(slot, ("a", 1))
    requests.tables[1, PER_SPLIT - 1] += 1
    requests.splits.extend(1, requests.tables[1], 0, PER_SPLIT + 1)
    assert requests.step() is None
