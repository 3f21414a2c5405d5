"""The bounded queue counts sequences; keys are compared whole."""

from __future__ import annotations

import time

import pytest

from sempre.engine.server.admission import Admission
from sempre.engine.server.api_keys import ApiKey
from sempre.engine.server.clients import KeyRing
from sempre.engine.server.errors import BadRequest, Busy
from sempre.engine.server.ledger import Ledger


def test_the_queue_is_full_at_its_capacity_and_not_before() -> None:
    admission = Admission(Ledger(), max_running=4, max_queued=2)
    admission.admit(3)
    admission.admit(3)
    with pytest.raises(Busy, match="busy"):
        admission.admit(1)
    admission.release(3)
    with pytest.raises(Busy):
        admission.admit(4)
    admission.admit(3)
    assert (admission.num_sequences, admission.num_rejected) == (6, 2)
    admission.release(3)
    admission.release(3)
    assert admission.num_sequences == 0


def test_what_can_never_fit_is_a_wrong_request() -> None:
    admission = Admission(Ledger(), max_running=4, max_queued=2)
    admission.admit(6)
    with pytest.raises(BadRequest, match=r"asks for 7 sequences.*holds at most 6"):
        admission.admit(7)


def test_requests_of_many_sequences_leave_room_for_those_of_few() -> None:
    admission = Admission(Ledger(), max_running=64, max_queued=64)
    with pytest.raises(BadRequest, match="holds at most 96 of one request"):
        admission.admit(97)
    admission.admit(96)
    with pytest.raises(Busy):
        admission.admit(17)
    for _ in range(32):
        admission.admit(1)
    with pytest.raises(Busy):
        admission.admit(1)
    assert admission.num_sequences == 128


def test_who_is_turned_away_is_told_to_come_back_when_enough_will_have_ended() -> None:
    admission = Admission(Ledger(), max_running=4, max_queued=2)
    assert admission.retry_after_s(6) == 1
    admission.admit(2)
    admission.release(2)
    time.sleep(0.3)
    assert admission.retry_after_s(20) >= 3
    assert admission.retry_after_s(20) >= admission.retry_after_s(1) >= 1
    assert admission.retry_after_s(10**6) == 60


def test_a_server_that_drains_lets_nobody_in() -> None:
    admission = Admission(Ledger(), max_running=4, max_queued=2)
    admission.draining = True
    with pytest.raises(Busy, match="shutting down"):
        admission.admit(1)
    assert admission.num_sequences == 0


@pytest.mark.parametrize("key", ["", "a", "a-ke", "a-key-", "a-key another", "A-key", " a-key", "another "])
def test_a_key_is_compared_whole(key: str) -> None:
    ring = KeyRing([ApiKey(secret=secret, name=secret) for secret in ("a-key", "another")], Ledger())
    assert ring.find(key) is None
    assert [ring.find(secret) for secret in ("a-key", "another")] == ring.clients
