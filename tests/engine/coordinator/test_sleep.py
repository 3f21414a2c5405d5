"""Falling asleep and waking up on several ranks: all are brought to one state, whoever dies or refuses meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.coordinator.sleep import RELEASE, RESTORE, SleepControl
from sempre.ipc.messages import CallMethodReply, ErrorInfo, SleepEngine, SleepReply, SleepTag, WakeEngine

ALL: list[SleepTag] = ["scheduling", "kv_cache", "weights"]
REFUSAL = ErrorInfo(type="ConfigError", message="no", rank=1)


class Ranks:
    """Two workers and their start-up, as a change of sleep sees them."""

    world_size = 2

    def __init__(self) -> None:
        self.sent: dict[int, tuple[str, list[Any], int]] = {}

    def send(self, rank: int, command: Any) -> None:
        self.sent[rank] = (command.method, command.args, command.call_id)

    def memory(self, tags: list[str]) -> list[Any]:
        return [tags, "/w", 3, 0]

    def take_sent(self) -> dict[int, tuple[str, list[str]]]:
        """Methods and tags of the commands since the last call."""
        self.ids = {rank: call_id for rank, (_, _, call_id) in self.sent.items()}
        sent, self.sent = self.sent, {}
        return {rank: (method, args[0]) for rank, (method, args, _) in sent.items()}


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def control(ranks: Ranks) -> SleepControl:
    made: Any = SleepControl
    return made(ranks, ranks)  # type: ignore[no-any-return]


def begin(control: SleepControl, tags: list[SleepTag], **fields: Any) -> None:
    command = SleepEngine(call_id=7, tags=tags, **fields)
    assert control.refusal(command, updates_weights=False) is None
    assert control.accept(command) is None


def answer(control: SleepControl, ranks: Ranks, rank: int, error: ErrorInfo | None = None) -> SleepReply | None:
    return control.take(rank, CallMethodReply(rank=rank, call_id=ranks.ids[rank], error=error))


def fall_asleep(control: SleepControl, ranks: Ranks, tags: list[SleepTag]) -> None:
    begin(control, tags)
    assert control.release() is None
    ranks.take_sent()
    assert answer(control, ranks, 0) is None
    assert answer(control, ranks, 1) == SleepReply(call_id=7, tags=tags)


def wake_up(control: SleepControl, tags: list[SleepTag]) -> SleepReply | None:
    command = WakeEngine(call_id=8, tags=tags)
    refusal = control.refusal(command, updates_weights=False)
    return control.accept(command) if refusal is None else refusal


def test_steps_are_held_until_the_engine_is_awake(control: SleepControl, ranks: Ranks) -> None:
    assert (control.is_pending, control.holds_steps) == (False, False)
    begin(control, ALL)
    assert (control.is_waiting, control.lets_finish, control.holds_steps) == (True, False, True)
    assert control.state(3) == [], "it is changing"
    assert control.release() is None
    assert ranks.take_sent() == {rank: (RELEASE, ["kv_cache", "weights"]) for rank in range(2)}
    assert answer(control, ranks, 1) is None
    assert answer(control, ranks, 1) is None, "a reply counts once"
    assert answer(control, ranks, 0) == SleepReply(call_id=7, tags=ALL)
    assert control.take_answers() == [SleepReply(call_id=3, tags=ALL)]
    assert control.state(4) == [SleepReply(call_id=4, tags=ALL)]
    assert wake_up(control, ["weights"]) is None
    assert ranks.take_sent() == {rank: (RESTORE, ["weights"]) for rank in range(2)}
    assert [answer(control, ranks, rank) for rank in range(2)] == [None, SleepReply(call_id=8, tags=ALL[:2])]
    assert control.holds_steps
    assert wake_up(control, ["kv_cache"]) is None
    assert [answer(control, ranks, rank) for rank in ranks.take_sent()] == [None, SleepReply(call_id=8)]
    assert (control.is_pending, control.holds_steps) == (False, False), "scheduling follows the last of the memory"


def test_requests_may_finish_first(control: SleepControl, ranks: Ranks) -> None:
    begin(control, ["scheduling"], mode="wait")
    assert (control.is_waiting, control.lets_finish, control.holds_steps, control.is_pending) == (
        True,
        True,
        False,
        True,
    )
    assert control.release() == SleepReply(call_id=7, tags=["scheduling"])
    assert ranks.take_sent() == {}
    assert (control.holds_steps, control.is_changing) == (True, False)
    assert wake_up(control, ["kv_cache"]) == SleepReply(call_id=8, tags=["scheduling"]), "that is there already"
    assert wake_up(control, ["scheduling"]) == SleepReply(call_id=8)


def test_what_is_refused(control: SleepControl, ranks: Ranks) -> None:
    fall_asleep(control, ranks, ALL)
    for tags, text in (
        (["kv_cache"], "expected 'weights' with or before 'kv_cache'"),
        (["scheduling"], "expected 'kv_cache' and 'weights' with or before 'scheduling'"),
        (["scheduling", "weights"], "expected 'kv_cache' with or before 'scheduling'"),
    ):
        reply = wake_up(control, tags)  # type: ignore[arg-type]
        assert reply is not None
        assert reply.error is not None
        assert (reply.tags, text in reply.error.message) == (ALL, True)
    assert "found them asleep: wake up 'weights'" in str(control.refuse_weights(0))
    assert wake_up(control, ["weights"]) is None
    busy = control.refusal(SleepEngine(call_id=9, tags=ALL), updates_weights=False)
    assert busy is not None
    assert busy.error is not None
    assert "found another change of sleep" in busy.error.message
    for rank in ranks.take_sent():
        answer(control, ranks, rank)
    assert control.refuse_weights(0) is None
    assert "found 3, which would finish with other weights" in str(control.refuse_weights(3))


@pytest.mark.parametrize("refusing", [0, 1])
def test_all_go_back_if_one_refuses(refusing: int, control: SleepControl, ranks: Ranks) -> None:
    begin(control, ALL)
    control.release()
    ranks.take_sent()
    assert [answer(control, ranks, rank, REFUSAL if rank == refusing else None) for rank in range(2)] == [None, None]
    assert ranks.take_sent() == {rank: (RESTORE, ["kv_cache", "weights"]) for rank in range(2)}
    found = [answer(control, ranks, rank) for rank in range(2)]
    assert found == [None, SleepReply(call_id=7, error=REFUSAL)]
    assert not control.is_pending


def test_a_successor_gets_the_state_of_the_others(control: SleepControl, ranks: Ranks) -> None:
    begin(control, ALL[:2])
    control.lose([1])
    assert not control.is_waiting, "a worker is missing"
    assert control.resume([1]) is None
    assert control.is_waiting
    control.release()
    ranks.take_sent()
    assert answer(control, ranks, 0) is None
    control.lose([1])
    assert control.resume([1]) is None
    assert ranks.take_sent() == {1: (RELEASE, ["kv_cache"])}
    assert answer(control, ranks, 1) == SleepReply(call_id=7, tags=ALL[:2])
    # asleep
    control.lose([0])
    assert control.resume([0]) is None
    assert ranks.take_sent() == {0: (RELEASE, ["kv_cache"])}
    assert answer(control, ranks, 0) is None
    # while it wakes up, a successor has all memory
    assert wake_up(control, ALL) is None
    ranks.take_sent()
    assert answer(control, ranks, 0) is None
    control.lose([1])
    assert control.resume([1]) == SleepReply(call_id=8)
