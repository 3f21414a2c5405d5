"""Frames with a valid header and a hostile message: the sender gets an error, and no process ends."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest
import zmq

from sempre.ipc.channel import HubChannel, PeerChannel
from sempre.ipc.codec import MAGIC, MAX_DEPTH, FrameDecoder, FrameEncoder
from sempre.ipc.errors import MessageMalformed, ProtocolError
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    CallMethod,
    CallMethodReply,
    CallWorkers,
    CallWorkersReply,
    ClientCommand,
    ClientEvent,
    ClientHello,
    Heartbeat,
    Refused,
    WorkerCommand,
    WorkerEvent,
)

DIRECTIONS = {
    "to coordinator": ClientCommand,
    "to client": ClientEvent,
    "to worker": WorkerCommand,
    "of worker": WorkerEvent,
}
LIMIT = 1 << 20
_RUNS = 1500


def seal(payload: bytes, sequence: int = 1) -> bytes:
    checked = sequence.to_bytes(8, "little") + payload
    return MAGIC + zlib.crc32(checked).to_bytes(4, "little") + checked


def deep(opening: bytes, levels: int = 200_000) -> bytes:
    return opening * levels


TROUBLE = {
    "arrays": deep(b"\x91"),
    "maps": deep(b"\x81\xa1a"),
    "maps as keys": deep(b"\x81"),
    "wide and deep": deep(b"\xdc\x00\x02", 60_000),
    "long text": b"\xdb" + (500_000).to_bytes(4, "big") + "ż".encode() * 250_000,
    "control characters": b"\xd9\x08\x1b[2J\r\n\x00\x9b"[:10],
    "array that lies": b"\xdd\xff\xff\xff\xff",
    "map that lies": b"\xdf\xff\xff\xff\xff",
    "bytes that lie": b"\xc6\xff\xff\xff\xff",
    "text that lies": b"\xdb\xff\xff\xff\xff",
    "no text": b"\xa2\xff\xfe",
    "half a surrogate pair": b"\xa3\xed\xa0\x80",
    "timestamp": b"\xc7\x0c\xff" + b"\xff" * 12,
    "extension": b"\xc9\x00\x00\x00\x02\x05ab",
    "reserved": b"\xc1",
    "nothing": b"",
    "a number": b"\xcf" + b"\xff" * 8,
    "not a number": b"\xcb\x7f\xf8" + b"\0" * 6,
    "list as a key": b"\x81\x91\x01\x01",
}


def hostile_payloads(union: Any) -> Iterator[bytes]:
    """Each trouble alone, as the tag, and as each of the first fields of each message."""
    yield from TROUBLE.values()
    for trouble in TROUBLE.values():
        yield b"\x93" + trouble
    for kind in get_args(union):
        tag = msgspec.msgpack.encode(kind.__name__)
        for trouble in TROUBLE.values():
            for before in (b"", b"\x00", b"\xa1a", b"\x00\x00", b"\x00\xa4ping", b"\x00\xa4ping\x90"):
                yield b"\xdc\x00\x06" + tag + before + trouble
            yield b"\x9f" + tag + trouble


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_a_frame_holds_is_its_sender_s_matter(direction: str) -> None:
    union: Any = DIRECTIONS[direction]
    decoder: FrameDecoder[Any] = FrameDecoder(union, LIMIT)
    texts = []
    for payload in hostile_payloads(union):
        try:
            decoder.decode(seal(payload))
        except ProtocolError as error:
            texts.append(str(error))
    assert len(texts) > 500
    assert max(map(len, texts)) < 1000


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mutated_messages(direction: str) -> None:
    _mutate(DIRECTIONS[direction], seed=1, runs=_RUNS)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_many_mutated_messages(direction: str, seed: int) -> None:
    _mutate(DIRECTIONS[direction], seed=1000 + seed, runs=50_000)


def _mutate(union: Any, *, seed: int, runs: int) -> None:
    """Changed, cut or inserted bytes raise nothing but ProtocolError."""
    drawn = random.Random(seed)
    decoder: FrameDecoder[Any] = FrameDecoder(union, LIMIT)
    short = [trouble[:300] for trouble in TROUBLE.values()]
    tags = [msgspec.msgpack.encode(kind.__name__) for kind in get_args(union)]
    fields = [b"\x00", b"\xa1a", b"\x90", b"\x80", b"\xc0", b"\xc3", b"\xc4\x01a", b"\xcb" + b"\0" * 8, *short]
    for _ in range(runs):
        parts = [drawn.choice(fields) for _ in range(drawn.randint(0, 9))]
        payload = bytearray(bytes([0x91 + len(parts)]) + drawn.choice(tags) + b"".join(parts))
        for _ in range(drawn.randint(0, 3)):
            at = drawn.randrange(len(payload))
            payload[at : at + drawn.choice([0, 1, 1, 4])] = drawn.choice([b"", drawn.randbytes(1), *short])
            payload = payload or bytearray(b"\0")
        try:
            decoder.decode(seal(bytes(payload)))
        except ProtocolError:
            continue


def nested(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda value: CallWorkers(call_id=0, method="m", args=[value]),
        lambda value: CallWorkers(call_id=0, method="m", kwargs={"a": value}),
        lambda value: CallMethod(call_id=0, method="m", args=[{"a": value}]),
        lambda value: CallMethodReply(rank=0, call_id=0, result=value),
        lambda value: CallWorkersReply(call_id=0, results=[value]),
    ],
)
def test_depth_is_bounded_on_both_sides(make: Any) -> None:
    """What one side lets through the other can send on."""
    encoder = FrameEncoder(LIMIT)
    encoder.encode(make(nested(MAX_DEPTH - 4)), 1)
    union: Any = next(union for union in DIRECTIONS.values() if type(make(1)) in get_args(union))
    decoder: FrameDecoder[Any] = FrameDecoder(union, LIMIT)
    for levels in (MAX_DEPTH + 1, 400, 100_000):
        if levels < 1000:
            with pytest.raises(MessageMalformed, match="nested"):
                decoder.decode(seal(msgspec.msgpack.encode(make(nested(levels)))))
        with pytest.raises(TypeError, match="nested"):
            encoder.encode(make(nested(levels)), 1)


@pytest.mark.parametrize("value", [2**70, -(2**63) - 1, "\ud800", {"\udfff": 1}, object()])
def test_a_value_without_a_form_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError):
        FrameEncoder(LIMIT).encode(CallMethodReply(rank=0, call_id=0, result=value), 1)


def test_a_refusal_fits_every_limit() -> None:
    """A small limit, and a frame as large as that: the answer is sent, and the next frame is taken."""
    limit = 1 << 16
    with (
        HubChannel[ClientCommand]("inproc://refusals", receives=ClientCommand, limit_bytes=limit) as hub,
        PeerChannel[ClientEvent]("inproc://refusals", receives=ClientEvent, limit_bytes=limit) as peer,
    ):
        text = "𝄞".encode() * 15_000
        peer.socket.send(seal(b"\x92\xda" + len(text).to_bytes(2, "big") + text + b"\x00"))
        assert hub.receive(0.2) is None
        answered = peer.receive(5)
        assert isinstance(answered, Refused)
        assert answered.error.facts["field"] == "tag"
        peer.socket.send(FrameEncoder(limit).encode(ClientHello(protocol_version=PROTOCOL_VERSION, pid=0), 1))
        arrival = hub.receive(5)
        assert arrival is not None
        assert isinstance(arrival[1], ClientHello)


def call_workers(number: int, trouble: bytes) -> bytes:
    return seal(b"\x94" + msgspec.msgpack.encode("CallWorkers") + b"\x00\xa4ping" + trouble, number)


def test_a_hub_outlives_hostile_frames_of_an_accepted_peer() -> None:
    with HubChannel[ClientCommand]("inproc://hostile-peer", receives=ClientCommand, limit_bytes=LIMIT) as hub:
        peer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        peer.connect("inproc://hostile-peer")
        peer.send(FrameEncoder(LIMIT).encode(ClientHello(protocol_version=PROTOCOL_VERSION, pid=0), 1))
        arrival = hub.receive(5)
        assert arrival is not None
        hub.accept(arrival[0])
        for number, trouble in enumerate(TROUBLE.values(), start=2):
            peer.send(call_workers(number, trouble))
            arrival = hub.receive(5)
            assert arrival is not None
            assert isinstance(arrival[1], ProtocolError | CallWorkers)
        peer.send(FrameEncoder(LIMIT).encode(Heartbeat(), len(TROUBLE) + 2))
        assert hub.receive(5) == (arrival[0], Heartbeat())
        peer.close()


def test_a_peer_outlives_hostile_frames_of_its_hub() -> None:
    hub: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    hub.bind("inproc://hostile-hub")
    with PeerChannel[WorkerCommand]("inproc://hostile-hub", receives=WorkerCommand, limit_bytes=LIMIT) as peer:
        peer.send(Heartbeat())
        identity = hub.recv_multipart()[0]
        for number, trouble in enumerate(TROUBLE.values(), start=1):
            hub.send_multipart([identity, seal(b"\x92" + trouble, number)])
            with pytest.raises(ProtocolError):
                peer.receive(5)
        hub.send_multipart([identity, FrameEncoder(LIMIT).encode(Heartbeat(), len(TROUBLE) + 1)])
        assert peer.receive(5) == Heartbeat()
    hub.close()
