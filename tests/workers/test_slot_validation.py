"""Slots of states in a step: what does not fit is refused by name, before anything is computed."""

from __future__ import annotations

import pytest

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import ScheduledRequest
from sempre.workers.slot_validation import SlotValidation


def item(name: str, start: int, count: int, read: int, writes: list[tuple[int, int]]) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=name,
        num_computed_tokens=start,
        num_tokens=count,
        block_table_start=0,
        block_ids=[],
        state_read=read,
        state_writes=writes,
    )


def test_a_slot_is_read_once_a_step_has_written_it() -> None:
    slots = SlotValidation(3)
    for step in ([item("a", 0, 4, -1, [(1, 2), (3, 0)])], [item("a", 4, 1, 0, [(0, 0)]), item("b", 2, 1, 2, [(0, 1)])]):
        slots.check(step)
        slots.record(step)


@pytest.mark.parametrize("read", [0, 1])
def test_a_slot_that_was_never_written_is_not_read(read: int) -> None:
    slots = SlotValidation(2)
    step = [item("a", 0, 1, -1, [(0, 1 - read)]), item("b", 3, 1, read, [])]
    slots.check(step)
    with pytest.raises(MessageMalformed, match=rf"'b': state_read: expected a slot .* found {read}"):
        slots.record(step)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ([item("a", 0, 1, 0, [])], "'a': state_read: expected -1 for a request's first token"),
        ([item("a", 2, 1, -1, [])], "found -1 before token 2"),
        ([item("a", 0, 1, -1, [(0, 4)])], r"slots less than 4, found reads -1, writes \[\(0, 4\)\]"),
        ([item("a", 1, 1, 4, [])], "slots less than 4"),
        ([item("a", 0, 2, -1, [(2, 0)])], "one slot for each of some of the 2 tokens"),
        ([item("a", 0, 2, -1, [(1, 0), (1, 2)])], "one slot for each"),
        ([item("a", 0, 2, -1, [(0, 0), (1, 0)])], "one slot for each"),
        (
            [item("a", 0, 1, -1, [(0, 1)]), item("b", 0, 1, -1, [(0, 1)])],
            "'b': state_writes: expected slots of no",
        ),
        ([item("a", 3, 1, 1, []), item("b", 0, 1, -1, [(0, 1)])], "'a': state_read: expected a slot that no other"),
    ],
)
def test_slots_that_do_not_fit_are_refused(step: list[ScheduledRequest], message: str) -> None:
    with pytest.raises(MessageMalformed, match=message):
        SlotValidation(4).check(step)


@pytest.mark.parametrize("wrong", [item("a", 1, 1, 0, []), item("a", 0, 1, -1, [(0, 0)])])
def test_a_model_without_states_has_no_slots(wrong: ScheduledRequest) -> None:
    slots = SlotValidation(0)
    slots.check([item("b", 5, 1, -1, [])])
    with pytest.raises(MessageMalformed, match="none, as no layer of the model keeps states"):
        slots.check([wrong])
