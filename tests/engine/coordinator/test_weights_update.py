"""An update of weights on several ranks: all take them, or none does."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.coordinator.weights_update import COMMIT, DROP, STAGE, WeightsUpdate
from sempre.ipc.errors import WorkerDied
from sempre.ipc.messages import CallMethodReply, ErrorInfo, UpdateWeights, UpdateWeightsReply

DEATH = WorkerDied("worker 1 died", rank=1, cause="killed by SIGKILL")


class Ranks:
    """Three workers and their start-up, as an update sees them."""

    world_size = 3

    def __init__(self) -> None:
        self.sent: list[tuple[int, str, int]] = []
        self.changes: list[tuple[str, str]] = []
        self.fingerprint = {"weights": "old"}

    def send(self, rank: int, command: Any) -> None:
        self.sent.append((rank, command.method, command.call_id))

    def change_weights(self, folder: str, digest: str) -> None:
        self.changes.append((folder, digest))
        self.fingerprint = {"weights": digest}

    def take_sent(self) -> list[tuple[int, str]]:
        """Ranks and methods of the commands since the last call."""
        sent, self.sent = self.sent, []
        self.call_id = sent[-1][2] if sent else -1
        return [(rank, method) for rank, method, _ in sent]


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def update(ranks: Ranks) -> WeightsUpdate:
    """One that has begun."""
    made: Any = WeightsUpdate
    update: WeightsUpdate = made(ranks, ranks)
    assert update.accept(UpdateWeights(call_id=7, path="/w")) is None
    assert (update.is_waiting, update.is_running, update.is_pending) == (True, False, True)
    update.start()
    assert (update.is_waiting, update.is_running) == (False, True)
    assert ranks.take_sent() == [(rank, STAGE) for rank in range(3)]
    return update


def answered(update: WeightsUpdate, ranks: Ranks, *results: object) -> list[UpdateWeightsReply | None]:
    """What the client is told after each rank's answer."""
    call_id = ranks.call_id
    return [
        update.take(rank, CallMethodReply(rank=rank, call_id=call_id, **_answer(result)))
        for rank, result in enumerate(results)
        if result is not ...
    ]


def _answer(result: object) -> dict[str, Any]:
    return {"error": result} if isinstance(result, ErrorInfo) else {"result": result}


def test_all_take_them(update: WeightsUpdate, ranks: Ranks) -> None:
    assert answered(update, ranks, "d", "d", "d") == [None] * 3
    assert ranks.take_sent() == [(rank, COMMIT) for rank in range(3)]
    assert ranks.changes == [("/w", "d")]
    reply = UpdateWeightsReply(call_id=7, fingerprint={"weights": "d"})
    assert answered(update, ranks, None, None, None) == [None, None, reply]
    assert not update.is_pending


def test_one_refuses(update: WeightsUpdate, ranks: Ranks) -> None:
    error = ErrorInfo(type="TensorMismatch", message="m")
    found = answered(update, ranks, "d", error, "d")
    assert found == [None, None, UpdateWeightsReply(call_id=7, error=error)]
    assert ranks.take_sent() == [(rank, DROP) for rank in range(3)]
    assert (ranks.changes, update.is_pending) == ([], False)
    assert answered(update, ranks, None, None, None) == [None] * 3, "nobody waits for these answers"


def test_two_read_different_files(update: WeightsUpdate, ranks: Ranks) -> None:
    reply = answered(update, ranks, "d", "d", "e")[-1]
    assert reply is not None
    assert reply.error is not None
    assert reply.error.message == "update_weights: rank 2 read weights e, rank 0 d"
    assert ranks.take_sent() == [(rank, DROP) for rank in range(3)]
    assert ranks.changes == []


def test_one_dies_before_the_others_commit(update: WeightsUpdate, ranks: Ranks) -> None:
    answered(update, ranks, "d", ..., "d")
    reply = update.lose([1], DEATH)
    assert reply is not None
    assert reply.error is not None
    assert reply.error.type == "WorkerDied"
    assert ranks.take_sent() == [(0, DROP), (2, DROP)]
    assert ranks.changes == []
    # the next one waits for the successor
    assert update.accept(UpdateWeights(call_id=8, path="/w")) is None
    assert not update.is_waiting
    assert update.resume([1]) is None
    assert update.is_waiting


def test_one_dies_while_it_commits(update: WeightsUpdate, ranks: Ranks) -> None:
    """Its successor reads the new weights at its start."""
    answered(update, ranks, "d", "d", "d")
    ranks.take_sent()
    assert update.lose([1], DEATH) is None
    assert answered(update, ranks, None, ..., None) == [None, None]
    assert update.resume([1]) == UpdateWeightsReply(call_id=7, fingerprint={"weights": "d"})


def test_one_at_a_time(update: WeightsUpdate) -> None:
    refusal = update.accept(UpdateWeights(call_id=9, path="/w"))
    assert refusal is not None
    assert refusal.call_id == 9
    assert refusal.error is not None
    assert "expected no other update of weights" in refusal.error.message
