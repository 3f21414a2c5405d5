"""Counts of requests by digest."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict

import pytest

from sempre.engine.seed_counts import MOST_DIGESTS, SeedCounts


def digest(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def test_counts_go_up_for_each_digest_by_itself() -> None:
    counts = SeedCounts()
    assert [counts.count(digest(n)) for n in (1, 2, 1, 1, 2, 3)] == [0, 0, 1, 2, 1, 0]


def test_as_a_dictionary_that_drops_its_oldest_key() -> None:
    """Whatever the order: many digests share a place of the index, and entries go round several times."""
    counts = SeedCounts(capacity=37)
    model: OrderedDict[int, int] = OrderedDict()
    dropped = 0
    state = 1
    for _ in range(5000):
        state = state * 6364136223846793005 % 2**64 + 1
        number = (state >> 33) % 60
        assert counts.count(digest(number)) == model.get(number, 0)
        if number not in model and len(model) == 37:
            model.popitem(last=False)
            dropped += 1
        model[number] = model.get(number, 0) + 1
    assert counts.num_dropped == dropped > 100


def test_digests_whose_chain_is_one(caplog: pytest.LogCaptureFixture) -> None:
    """Capacity 1 to 3: first, middle and last of a chain are taken out."""
    for capacity in (1, 2, 3):
        counts = SeedCounts(capacity)
        keys = [(capacity * n).to_bytes(8, "little") for n in range(capacity + 2)]
        assert [counts.count(key) for key in keys] == [0] * len(keys)
        assert [counts.count(key) for key in keys[2:]] == [1] * capacity
        assert counts.count(keys[0]) == 0


def test_dropping_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    counts = SeedCounts(capacity=2)
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            counts.count(digest(number))
        assert caplog.messages == []
        for number in range(2, 5):
            counts.count(digest(number))
    assert [message.split(" different")[0] for message in caplog.messages] == ["2"]
    assert counts.num_dropped == 3


def test_four_million() -> None:
    assert MOST_DIGESTS == 4 * 2**20
