"""Channels over real sockets: what is refused is answered, and harms nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sempre.ipc.async_channel import AsyncPeerChannel
from sempre.ipc.channel import HubChannel, PeerChannel
from sempre.ipc.codec import FrameDecoder, FrameEncoder
from sempre.ipc.errors import FrameLost, MessageMalformed, MessageTooLarge, ProtocolError
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    ClientCommand,
    ClientEvent,
    ClientHello,
    GetMetrics,
    Heartbeat,
    OutputsReady,
    Refused,
    RequestOutputDelta,
)

LIMIT = 1 << 16
HELLO = ClientHello(protocol_version=PROTOCOL_VERSION, pid=1)
WAIT_S = 10.0


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/hub"


@pytest.fixture
def hub(address: str) -> Iterator[HubChannel[ClientCommand]]:
    with HubChannel[ClientCommand](address, receives=ClientCommand, limit_bytes=LIMIT) as channel:
        yield channel


@pytest.fixture
def peer(hub: HubChannel[ClientCommand]) -> Iterator[PeerChannel[ClientEvent]]:
    with PeerChannel[ClientEvent](hub.address, receives=ClientEvent, limit_bytes=LIMIT) as channel:
        yield channel


@pytest.fixture
def stranger(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A socket that sends anything."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    yield socket
    socket.close()


def establish(hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent]) -> bytes:
    peer.send(HELLO)
    arrival = hub.receive(WAIT_S)
    assert arrival is not None
    assert arrival[1] == HELLO
    hub.accept(arrival[0])
    return arrival[0]


def answer_to(stranger: zmq.Socket[bytes]) -> Refused:
    assert stranger.poll(WAIT_S * 1000)
    decoder: FrameDecoder[ClientEvent] = FrameDecoder(ClientEvent, LIMIT)
    sequence, message = decoder.decode(stranger.recv())
    assert sequence == 0
    assert isinstance(message, Refused)
    return message


def test_messages_go_both_ways(hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent]) -> None:
    identity = establish(hub, peer)
    for count in range(3):
        peer.send(GetMetrics(call_id=count))
        assert hub.receive(WAIT_S) == (identity, GetMetrics(call_id=count))
        hub.send(identity, Heartbeat(steps_done=count))
        assert peer.receive(WAIT_S) == Heartbeat(steps_done=count)
    assert hub.receive() is None
    assert peer.receive(0) is None


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([b""], "MessageMalformed"),
        ([b"\0" * 100], "MessageMalformed"),
        ([bytes(FrameEncoder(LIMIT).encode(HELLO, 1))[:-1]], "MessageMalformed"),
        ([bytes(FrameEncoder(LIMIT).encode(Heartbeat(), 1)), b""], "MessageMalformed"),
        ([bytes(FrameEncoder(LIMIT).encode(OutputsReady(outputs=[]), 1))], "MessageMalformed"),
        ([b"\0" * (LIMIT + 1)], "MessageTooLarge"),
    ],
)
def test_a_stranger_is_refused_and_harms_nobody(
    hub: HubChannel[ClientCommand],
    peer: PeerChannel[ClientEvent],
    stranger: zmq.Socket[bytes],
    frames: list[bytes],
    error: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    identity = establish(hub, peer)
    with caplog.at_level(logging.WARNING):
        stranger.send_multipart(frames)
        for _ in range(200):
            assert hub.receive(0.05) is None
            if hub.refusals.count:
                break
    assert answer_to(stranger).error.type == error
    assert len(caplog.records) == 1
    assert hub.address in caplog.text
    peer.send(GetMetrics(call_id=1))
    assert hub.receive(WAIT_S) == (identity, GetMetrics(call_id=1))


def test_the_transport_drops_what_is_far_too_large(
    hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent], stranger: zmq.Socket[bytes]
) -> None:
    identity = establish(hub, peer)
    stranger.send(b"\0" * (2 * LIMIT + 1))
    assert hub.receive(0.2) is None
    peer.send(GetMetrics(call_id=1))
    assert hub.receive(WAIT_S) == (identity, GetMetrics(call_id=1))
    assert hub.refusals.count == 0, "it must not be taken into memory only to be refused"


@pytest.mark.parametrize(
    ("frames", "field"),
    [
        ([b""], "header"),
        ([b"\0" * 100], "magic"),
        ([b"\0" * (LIMIT + 1)], "max_message_bytes"),
        ([bytes(FrameEncoder(LIMIT).encode(Heartbeat(), 1))[:-1]], "checksum"),
        ([bytes(FrameEncoder(LIMIT).encode(Heartbeat(), 1)), b""], "parts"),
        ([bytes(FrameEncoder(LIMIT).encode(GetMetrics(call_id=1), 1))], "tag"),
    ],
)
def test_a_peer_refuses_what_a_hub_must_not_send(
    hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent], frames: list[bytes], field: str
) -> None:
    identity = establish(hub, peer)
    hub._links[identity].pack(Heartbeat())  # the frame whose place they take
    hub.socket.send_multipart([identity, *frames])
    with pytest.raises(ProtocolError, match=field):
        peer.receive(WAIT_S)
    arrival = hub.receive(WAIT_S)
    assert arrival is not None
    assert isinstance(arrival[1], Refused)
    hub.send(identity, Heartbeat(steps_done=1))
    assert peer.receive(WAIT_S) == Heartbeat(steps_done=1)


def test_a_refusal_on_an_established_link_reaches_both_ends(
    hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent]
) -> None:
    identity = establish(hub, peer)
    peer.socket.send(peer._link.pack(Heartbeat())[:-1])
    arrival = hub.receive(WAIT_S)
    assert arrival is not None
    assert arrival[0] == identity
    assert isinstance(arrival[1], MessageMalformed)
    answer = peer.receive(WAIT_S)
    assert isinstance(answer, Refused)
    assert answer.error.facts == {"field": "checksum"}
    hub.socket.send_multipart([identity, hub._links[identity].pack(Heartbeat())[:-1]])
    with pytest.raises(MessageMalformed):
        peer.receive(WAIT_S)
    assert isinstance(hub.receive(WAIT_S)[1], Refused)  # type: ignore[index]


def test_a_lost_frame_is_an_error_at_the_next_one(
    hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent]
) -> None:
    establish(hub, peer)
    peer._link.pack(GetMetrics(call_id=1))  # counted, never sent
    peer.send(GetMetrics(call_id=2))
    arrival = hub.receive(WAIT_S)
    assert arrival is not None
    assert isinstance(arrival[1], FrameLost)
    answer = peer.receive(WAIT_S)
    assert isinstance(answer, Refused)
    assert answer.error.facts == {"expected": 2, "found": 3}


def test_two_ends_that_refuse_each_other_fall_silent(
    hub: HubChannel[ClientCommand], address: str, stranger: zmq.Socket[bytes]
) -> None:
    """A peer that answers every refusal with another refused frame would otherwise exchange refusals forever."""
    with PeerChannel[ClientCommand](address, receives=ClientCommand, limit_bytes=LIMIT) as peer:
        peer.send(HELLO)
        arrival = hub.receive(WAIT_S)
        assert arrival is not None
        for _ in range(100):
            hub.socket.send_multipart([arrival[0], b"garbage"])
            with pytest.raises(MessageMalformed):
                peer.receive(WAIT_S)
        answers = 0
        while hub.receive(0.1) is not None:
            answers += 1
        assert 0 < answers < 100


def test_a_flood_of_refused_frames_does_not_hold_the_caller(
    hub: HubChannel[ClientCommand], stranger: zmq.Socket[bytes]
) -> None:
    for _ in range(20):
        stranger.send(b"garbage")
    for count in range(1, 21):
        assert hub.socket.poll(WAIT_S * 1000)
        assert hub.receive() is None
        assert hub.refusals.count == count, "one frame in a call that may not wait"


def test_a_large_message_is_refused_before_it_is_sent(
    hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent]
) -> None:
    identity = establish(hub, peer)
    with pytest.raises(MessageTooLarge):
        hub.send(identity, OutputsReady(outputs=[RequestOutputDelta(request_id="x" * LIMIT)]))
    # and takes no number, so that the link continues
    hub.send(identity, Heartbeat(steps_done=1))
    assert peer.receive(WAIT_S) == Heartbeat(steps_done=1)


def test_sending_to_a_peer_that_is_gone_names_the_address(
    hub: HubChannel[ClientCommand], peer: PeerChannel[ClientEvent]
) -> None:
    identity = establish(hub, peer)
    peer.close()

    def send_until_noticed() -> None:
        for _ in range(1000):
            hub.send(identity, Heartbeat())
            hub.socket.poll(10)

    with pytest.raises(ProtocolError, match=hub.address):
        send_until_noticed()


def test_errors_of_binding_and_connecting_name_the_address() -> None:
    nowhere = "ipc:///nonexistent/folder/hub"
    with pytest.raises(ProtocolError, match=nowhere):
        HubChannel[ClientCommand](nowhere, receives=ClientCommand, limit_bytes=LIMIT)
    with pytest.raises(ProtocolError, match="nonsense"):
        PeerChannel[ClientEvent]("nonsense", receives=ClientEvent, limit_bytes=LIMIT)


def test_an_asynchronous_peer(hub: HubChannel[ClientCommand], address: str) -> None:
    async def converse() -> None:
        with AsyncPeerChannel[ClientEvent](address, receives=ClientEvent, limit_bytes=LIMIT) as peer:
            peer.send(HELLO)
            arrival = hub.receive(WAIT_S)
            assert arrival is not None
            hub.accept(arrival[0])
            assert await peer.receive(0.01) is None
            cancelled = asyncio.create_task(peer.receive(WAIT_S))
            await asyncio.sleep(0)
            hub.send(arrival[0], Heartbeat(steps_done=5))
            while not int(peer.socket.get(zmq.EVENTS)) & zmq.POLLIN:
                time.sleep(0.001)
            assert cancelled.cancel()  # while it waits, and after the message has arrived
            assert await peer.receive(WAIT_S) == Heartbeat(steps_done=5)

    asyncio.run(converse())


def test_an_asynchronous_peer_returns_what_has_arrived_without_waiting(
    hub: HubChannel[ClientCommand], address: str
) -> None:
    async def converse() -> None:
        with AsyncPeerChannel[ClientEvent](address, receives=ClientEvent, limit_bytes=LIMIT) as peer:
            peer.send(HELLO)
            arrival = hub.receive(WAIT_S)
            assert arrival is not None
            hub.accept(arrival[0])
            for number in range(3):
                hub.send(arrival[0], Heartbeat(steps_done=number))
            assert await peer.receive(WAIT_S) == Heartbeat(steps_done=0)
            for number in (1, 2):
                while not int(peer.socket.get(zmq.EVENTS)) & zmq.POLLIN:
                    await asyncio.sleep(0.001)
                with pytest.raises(StopIteration) as done:
                    peer.receive(WAIT_S).send(None)
                assert done.value.value == Heartbeat(steps_done=number)
            assert await peer.receive(0.01) is None
            hub.send(arrival[0], Heartbeat(steps_done=3))
            assert await peer.receive(WAIT_S) == Heartbeat(steps_done=3)

    asyncio.run(converse())


def test_an_asynchronous_peer_that_sends_misses_nothing(hub: HubChannel[ClientCommand], address: str) -> None:
    """What it sends may use up the signal that something has arrived."""

    async def converse() -> None:
        with AsyncPeerChannel[ClientEvent](address, receives=ClientEvent, limit_bytes=LIMIT) as peer:
            peer.send(HELLO)
            arrival = hub.receive(WAIT_S)
            assert arrival is not None
            hub.accept(arrival[0])
            for number in range(50):
                waiting = asyncio.create_task(peer.receive(WAIT_S))
                await asyncio.sleep(0)
                hub.send(arrival[0], Heartbeat(steps_done=number))
                time.sleep(0.002)  # it arrives while the event loop does something else
                peer.send(Heartbeat())
                assert await waiting == Heartbeat(steps_done=number)

    asyncio.run(converse())


def test_an_asynchronous_peer_may_be_closed_after_its_event_loop(address: str, hub: HubChannel[ClientCommand]) -> None:
    async def connect() -> AsyncPeerChannel[ClientEvent]:
        return AsyncPeerChannel[ClientEvent](address, receives=ClientEvent, limit_bytes=LIMIT)

    peer = asyncio.run(connect())
    peer.close()
    peer.close()
    assert peer.socket.closed
