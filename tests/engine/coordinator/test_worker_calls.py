"""Calls of all workers while some of them are replaced: asked again once, in order, then an error."""

from __future__ import annotations

from sempre.engine.coordinator.worker_calls import WorkerCalls
from sempre.ipc.errors import ProtocolError, SempreError, WorkerDied
from sempre.ipc.messages import CallMethod, CallMethodReply, CallWorkers, WorkerCommand, WorkerEvent, WorkerHealth

DEATH = WorkerDied("worker 1 died", rank=1, cause="killed by SIGKILL")


class Recorder:
    """Two workers that keep what they are sent."""

    world_size = 2

    def __init__(self) -> None:
        self.sent: list[tuple[int, CallMethod]] = []

    def send(self, rank: int, command: WorkerCommand) -> None:
        assert isinstance(command, CallMethod)
        self.sent.append((rank, command))

    def receive(self) -> tuple[int, WorkerEvent] | None:
        return None

    def blame(self, rank: int, error: ProtocolError) -> SempreError:
        return error

    def health(self) -> list[WorkerHealth]:
        return []

    def shutdown(self) -> None:
        pass

    def take_sent(self) -> list[tuple[int, str, int]]:
        sent, self.sent = self.sent, []
        return [(rank, command.method, command.call_id) for rank, command in sent]


def reply(rank: int, call_id: int) -> CallMethodReply:
    return CallMethodReply(rank=rank, call_id=call_id, result=f"of rank {rank}")


def test_replies_come_in_rank_order_under_the_client_s_number() -> None:
    executor = Recorder()
    calls = WorkerCalls(executor)
    calls.start(CallWorkers(call_id=70, method="a"))
    [(_, _, number), _] = executor.take_sent()
    assert calls.pending()
    assert calls.take(1, reply(1, number)) is None
    answer = calls.take(0, reply(0, number))
    assert answer is not None
    assert (answer.call_id, answer.results) == (70, ["of rank 0", "of rank 1"])
    assert not calls.pending()


def test_a_call_under_way_is_sent_again_before_those_that_came_during_the_outage() -> None:
    executor = Recorder()
    calls = WorkerCalls(executor)
    calls.start(CallWorkers(call_id=70, method="under way"))
    [(_, _, former), _] = executor.take_sent()
    assert calls.take(0, reply(0, former)) is None
    assert calls.lose([1], DEATH) == []
    calls.start(CallWorkers(call_id=71, method="later"))
    assert executor.take_sent() == []
    assert calls.pending()
    assert calls.take(0, reply(0, former)) is None, "it answers what is asked again"
    calls.resume([1])
    sent = executor.take_sent()
    assert [(rank, method) for rank, method, _ in sent] == [
        (0, "under way"),
        (1, "under way"),
        (0, "later"),
        (1, "later"),
    ]
    assert former not in {number for _, _, number in sent}


def test_a_call_that_loses_its_worker_twice_fails() -> None:
    executor = Recorder()
    calls = WorkerCalls(executor)
    calls.start(CallWorkers(call_id=70, method="deadly"))
    assert calls.lose([1], DEATH) == []
    calls.start(CallWorkers(call_id=71, method="later"))
    calls.resume([1])
    [failed] = calls.lose([1], DEATH)
    assert failed.call_id == 70
    assert failed.error is not None
    assert failed.error.message == "worker 1 died during the call for the second time (killed by SIGKILL)."
    executor.take_sent()
    calls.resume([1])
    assert [method for _, method, _ in executor.take_sent()] == ["later", "later"]
