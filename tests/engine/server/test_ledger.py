"""What the API processes of one server keep together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from sempre.engine.seed_counts import SeedCounts
from sempre.engine.server.admission import Admission
from sempre.engine.server.api_keys import ApiKey
from sempre.engine.server.clients import KeyRing
from sempre.engine.server.errors import APIError
from sempre.engine.server.ledger import Ledger, Place
from sempre.engine.server.metrics import ServerMetrics


def ledgers(path: Path, count: int = 2) -> list[Ledger]:
    return [Ledger(Place(number, count, path)) for number in range(count)]


def test_counters_are_summed_and_outlive_a_process_whose_gauges_end_with_it(tmp_path: Path) -> None:
    one, two = ledgers(tmp_path / "ledger")
    for ledger, amount in ((one, 2), (two, 3)):
        counted, now = ledger.counter(2), ledger.gauge(1)
        counted.own[1] += amount
        now.own[0] += amount
    assert (counted.totals(), now.total()) == ([0.0, 5.0], 5.0)
    successor = Ledger(Place(0, 2, tmp_path / "ledger"))
    assert successor.counter(2).totals() == [0.0, 5.0]
    assert successor.gauge(1).total() == 3.0
    alone = Ledger()
    assert alone.counter(2).totals() == [0.0, 0.0]


def test_all_processes_share_one_queue_and_one_rate(tmp_path: Path) -> None:
    queues = [Admission(ledger, max_running=2, max_queued=1) for ledger in ledgers(tmp_path / "queue")]
    queues[0].admit(2)
    queues[1].admit(1)
    assert [refused(partial(queue.admit, 1)) for queue in queues] == [503, 503]
    assert [(queue.num_sequences, queue.num_rejected) for queue in queues] == [(3, 2)] * 2
    queues[0].release(2)
    queues[1].admit(2)

    keys = [ApiKey(secret="s", name="n", requests_per_minute=5, max_sequences=3)]
    clients = [KeyRing(keys, ledger, clock=lambda: 100.0).clients[0] for ledger in ledgers(tmp_path / "rates")]
    found = [refused(clients[turn % 2].enter) for turn in range(7)]
    assert found == [None] * 5 + [429] * 2
    clients[0].admit(2, 8, 1)
    assert refused(lambda: clients[1].admit(2, 8, 1)) == 429


def test_histograms_of_all_processes_are_one(tmp_path: Path) -> None:
    one, two = (ServerMetrics("m", ledger) for ledger in ledgers(tmp_path / "ledger"))
    one.first_token.observe(0.5)
    two.first_token.observe(2.0)
    assert one.first_token.buckets() == two.first_token.buckets()
    assert (one.first_token.buckets()[-1], one.first_token.sum) == (("+Inf", 2.0), 2.5)


def test_requests_without_a_seed_are_counted_together(tmp_path: Path) -> None:
    one, two = (SeedCounts(64, tmp_path / "seeds") for _ in range(2))
    digests = [bytes([number]) * 32 for number in range(3)]
    assert [counts.count(digest) for digest in digests for counts in (one, two, one)] == [0, 1, 2] * 3
    apart = SeedCounts(64)
    assert apart.count(digests[0]) == 0
    for counts in (one, two):
        counts.close()


def refused(call: Callable[[], None]) -> int | None:
    try:
        call()
    except APIError as error:
        return error.status
    return None
