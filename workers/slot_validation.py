"""Checks of the slots of states that a step reads and writes: no state is read that nobody has written."""

from __future__ import annotations

from collections.abc import Sequence

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import ScheduledRequest


class SlotValidation:
    """Knows which slots have been written."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._is_written = [False] * num_slots

    def check(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Raises MessageMalformed when the slots of a step do not fit the model, its requests, or each other."""
        if not self._num_slots:
            for item in scheduled:
                if item.state_read >= 0 or item.state_writes:
                    raise _malformed(item, "state_writes", "none, as no layer of the model keeps states", _slots(item))
            return
        owners: dict[int, str] = {}
        for item in scheduled:
            self._check_item(item)
            for _, slot in item.state_writes:
                if owners.setdefault(slot, item.request_id) != item.request_id:
                    raise _malformed(item, "state_writes", "slots of no other request of the step", _slots(item))
        for item in scheduled:
            if owners.get(item.state_read, item.request_id) != item.request_id:
                expected = "a slot that no other request of the step writes"
                raise _malformed(item, "state_read", expected, str(item.state_read))

    def _check_item(self, item: ScheduledRequest) -> None:
        if (item.state_read < 0) != (item.num_computed_tokens == 0):
            expected = "-1 for a request's first token, and a slot for any other"
            found = f"{item.state_read} before token {item.num_computed_tokens}"
            raise _malformed(item, "state_read", expected, found)
        rows, slots = ([pair[at] for pair in item.state_writes] for at in (0, 1))
        if max([item.state_read, *slots], default=-1) >= self._num_slots:
            raise _malformed(item, "state_writes", f"slots less than {self._num_slots}", _slots(item))
        if len(set(rows)) < len(rows) or len(set(slots)) < len(slots) or max(rows, default=0) >= item.num_tokens:
            expected = f"one slot for each of some of the {item.num_tokens} tokens"
            raise _malformed(item, "state_writes", expected, _slots(item))

    def record(self, healthy: Sequence[ScheduledRequest]) -> None:
        """The step computes these requests. Raises MessageMalformed for one that reads a slot that was never
        written."""
        if not self._num_slots:
            return
        for item in healthy:
            if item.state_read >= 0 and not self._is_written[item.state_read]:
                raise _malformed(item, "state_read", "a slot that an earlier step has written", str(item.state_read))
        for item in healthy:
            for _, slot in item.state_writes:
                self._is_written[slot] = True


def _slots(item: ScheduledRequest) -> str:
    return f"reads {item.state_read}, writes {item.state_writes}"


def _malformed(item: ScheduledRequest, name: str, expected: str, found: str) -> MessageMalformed:
    return MessageMalformed(
        f"ExecuteStep: scheduled request {item.request_id!r}: {name}: expected {expected}, found {found}.",
        field=f"scheduled.{name}",
    )
