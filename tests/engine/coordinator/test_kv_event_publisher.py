"""Batches of KV events over ZeroMQ: frames, numbers, replay, and subscribers that do not read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from sempre.engine.coordinator.kv_event_publisher import END, KVEventPublishers
from sempre.engine.scheduling.kv_events import KVEvents
from sempre.engine.scheduling.prefix_cache import BlockKey
from sempre.ipc.config import KVEventsConfig
from sempre.ipc.errors import ConfigError

PATIENCE_MS = 60_000


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[Any]:
    """Start publishers; returns them and the events of each replica."""
    started: list[KVEventPublishers] = []

    def start(num_replicas: int = 1, **settings: Any) -> tuple[KVEventPublishers, list[KVEvents]]:
        addresses = {"endpoint": f"ipc://{tmp_path}/pub", "replay_endpoint": f"ipc://{tmp_path}/replay"}
        config = KVEventsConfig(enable_kv_cache_events=True, **addresses | settings)
        publishers = KVEventPublishers(config, num_replicas)
        started.append(publishers)
        publishers.open()
        events = [publishers.follow(replica, block_size=1) for replica in range(num_replicas)]
        return publishers, [found for found in events if found is not None]

    yield start
    for publishers in started:
        publishers.close()


def connected(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    socket.connect(address)
    return socket


def subscribed(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    publishers: KVEventPublishers,
    events: KVEvents,
    **options: int,
) -> zmq.Socket[bytes]:
    """A subscriber that has received its first batch: publishes until one arrives."""
    socket = context.socket(zmq.SUB)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.setsockopt(zmq.SUBSCRIBE, b"kv")
    socket.connect(address)
    for _ in range(PATIENCE_MS // 20):
        events.cleared()
        publishers.flush()
        if socket.poll(20):
            return socket
    raise AssertionError("no batch has arrived")


def drain(socket: zmq.Socket[bytes]) -> int:
    """Read what has arrived; return the last number."""
    last = -1
    while socket.poll(200):
        last = int.from_bytes(socket.recv_multipart()[1], "big")
    return last


def replayed(socket: zmq.Socket[bytes], first: int) -> dict[int, bytes]:
    """The batches that are repeated from number `first` on."""
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    found = {}
    while True:
        empty, number, payload = socket.recv_multipart()
        assert empty == b""
        if number == END:
            assert payload == b""
            return found
        found[int.from_bytes(number, "big")] = payload


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"), b"")


def test_a_message_is_topic_number_and_batch(context: Any, publishing: Any, tmp_path: Path) -> None:
    publishers, (events,) = publishing(topic="kv@pod")
    socket = subscribed(context, f"ipc://{tmp_path}/pub", publishers, events)
    last = drain(socket)
    events.removed(key(3))
    publishers.flush()
    publishers.flush()  # nothing has happened: no batch
    events.cleared()
    publishers.flush()
    socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    messages = [socket.recv_multipart() for _ in range(2)]
    assert [message[:2] for message in messages] == [
        [b"kv@pod", number.to_bytes(8, "big")] for number in (last + 1, last + 2)
    ]
    replay = connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay")
    assert replayed(replay, last + 1) == {last + 1: messages[0][2], last + 2: messages[1][2]}
    assert replayed(replay, last + 3) == {}


def test_each_replica_has_its_own_addresses_and_numbers(context: Any, publishing: Any, tmp_path: Path) -> None:
    publishers, (_, events) = publishing(2)
    events.cleared()
    publishers.flush()
    other = connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay_dp1")
    while not (found := replayed(other, 0)):
        pass  # the publishing thread has not yet had its turn
    assert [*found] == [0]
    assert replayed(connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay"), 0) == {}


def test_a_subscriber_that_does_not_read_misses_batches_and_can_ask_for_them(
    context: Any, publishing: Any, tmp_path: Path
) -> None:
    """Flushing never waits for it: 50 MB are published while it reads nothing, and all of it is kept."""
    publishers, (events,) = publishing(topic="kv", hwm=4, buffer_steps=5000)
    socket = subscribed(context, f"ipc://{tmp_path}/pub", publishers, events, RCVHWM=1, RCVBUF=4096)
    begin = drain(socket) + 1
    for number in range(2000):
        for block in range(2500):
            events.removed(key(number * 2500 + block + (1 << 60)))
        publishers.flush()
    replay = connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay")
    while len(kept := replayed(replay, begin)) < 2000:
        pass  # the publishing thread has not yet caught up
    assert [*kept] == [*range(begin, begin + 2000)]
    received = []
    while socket.poll(500):
        received.append(int.from_bytes(socket.recv_multipart()[1], "big"))
    assert received == sorted(received)
    assert {*received} < {*kept}, "it has missed some"


def test_only_so_many_batches_are_kept(context: Any, publishing: Any, tmp_path: Path) -> None:
    publishers, (events,) = publishing(buffer_steps=3)
    for _ in range(10):
        events.cleared()
        publishers.flush()
    replay = connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay")
    while 9 not in (kept := replayed(replay, 0)):
        pass  # the publishing thread has not yet caught up
    assert [*kept] == [7, 8, 9]


def test_a_malformed_replay_request_harms_nobody(context: Any, publishing: Any, tmp_path: Path) -> None:
    publishers, (events,) = publishing()
    events.cleared()
    publishers.flush()
    replay = connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay")
    for frames in ([b""], [b"x"], [b"", b"short"], [b"", b"8 bytes.", b""], [b"no", b"8 bytes."]):
        replay.send_multipart(frames)
    assert replayed(replay, 2**64 - 1) == {}


def test_a_batch_that_finds_no_room_is_missing_by_its_number(
    context: Any, publishing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publishers, (events,) = publishing(max_queue_size=1)
    publisher = publishers._publishers[0]
    stuck = publisher._push
    # nobody reads from this one
    publisher._push = context.socket(zmq.PUSH)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            events.cleared()
            publishers.flush()
    publisher._push.close(linger=0)
    publisher._push = stuck
    events.cleared()
    publishers.flush()
    replay = connected(context, zmq.DEALER, f"ipc://{tmp_path}/replay")
    while not (kept := replayed(replay, 0)):
        pass  # the publishing thread has not yet had its turn
    assert [*kept] == [3]
    assert [record.getMessage() for record in caplog.records] == [
        "kv_events_config['max_queue_size']: the publisher of replica 0 is behind, and batches from number 0 on are"
        " lost, which subscribers see"
    ]


def test_an_address_in_use_is_named(context: Any, publishing: Any) -> None:
    taken = context.socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://*")
    with pytest.raises(
        ConfigError, match=rf"kv_events_config\['endpoint'\]: cannot bind tcp://\*:{port}: Address .* use"
    ):
        publishing(endpoint=f"tcp://*:{port}")


def test_nothing_is_opened_unless_it_publishes() -> None:
    for config in (None, KVEventsConfig(), KVEventsConfig(enable_kv_cache_events=True, publisher="null")):
        publishers = KVEventPublishers(config, 1)
        publishers.open()
        assert publishers.follow(0, 16) is None
        publishers.flush()
        publishers.close()
