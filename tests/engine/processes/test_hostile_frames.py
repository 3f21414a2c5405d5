"""Garbage, truncated, oversized, wrongly-versioned and misplaced frames on every socket: refused by name, no harm."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator

import pytest
import zmq

from sempre.engine.harness import Cluster
from sempre.ipc.codec import MAGIC, FrameDecoder, FrameEncoder
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    AddRequests,
    ClientEvent,
    ClientHello,
    ErrorInfo,
    Heartbeat,
    Message,
    Refused,
    RequestSpec,
    RngDigests,
    ShutdownEngine,
    StepResult,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)

LIMIT = 1 << 16
ENCODER = FrameEncoder(1 << 20)
DECODER: FrameDecoder[ClientEvent] = FrameDecoder(ClientEvent, LIMIT)
Requests = Callable[..., list[RequestSpec]]


def frame(message: Message) -> bytes:
    return bytes(ENCODER.encode(message, 1))


HELLO = ClientHello(protocol_version=PROTOCOL_VERSION, pid=0)
NO_DIGESTS = RngDigests(python_random="", numpy_random="", torch_cpu="")
WORKER_HELLO = WorkerHello(protocol_version=PROTOCOL_VERSION, rank=0, pid=0)
GARBAGE = [
    ([b""], "header"),
    ([b"\0" * 64], "magic"),
    ([os.urandom(200)], "magic"),
    ([frame(HELLO)[:-1]], "checksum"),
    ([frame(HELLO)[:10]], "header"),
    ([frame(HELLO), b"second part"], "parts"),
    ([b"\0" * (LIMIT + 1)], "MessageTooLarge"),
]


def sealed(payload: bytes) -> bytes:
    checked = (1).to_bytes(8, "little") + payload
    return MAGIC + zlib.crc32(checked).to_bytes(4, "little") + checked


NESTED = [
    ([sealed(b"\x91" * 60_000)], "tag"),
    ([sealed(b"\x94\xabCallWorkers\x00" + b"\x91" * 60_000)], "CallWorkers.method"),
    ([sealed(b"\x94\xabCallWorkers\x00\xa4ping" + b"\x91" * 60_000)], "$"),
    ([sealed(b"\x94\xa9ModelLoaded\x00" + b"\x81\xa1a" * 20_000)], "tag"),
    ([sealed(b"\x92\xda\xea\x60" + "𝄞".encode() * 15_000 + b"\x00")], "tag"),
]
TO_CLIENT_SOCKET = [
    *GARBAGE,
    *NESTED,
    ([frame(Heartbeat())], "tag"),
    ([frame(ShutdownEngine())], "tag"),
    ([frame(AddRequests(requests=[]))], "tag"),
    ([frame(WORKER_HELLO)], "tag"),
    ([frame(ClientHello(protocol_version=9, pid=os.getpid()))], "VersionMismatch"),
    ([frame(HELLO)], "ClientHello.pid"),
    ([frame(ClientHello(protocol_version=PROTOCOL_VERSION, pid=os.getpid()))], "tag"),  # a second client
]
TO_WORKER_SOCKET = [
    *GARBAGE,
    NESTED[0],
    NESTED[-1],
    ([sealed(b"\x93\xaaStepResult\x00" + b"\x91" * 60_000)], "StepResult.step_id"),
    ([sealed(b"\x94\xafCallMethodReply\x00\x01" + b"\x81\xa1a" * 20_000)], "$"),
    ([frame(StepResult(rank=0, step_id=0))], "tag"),
    ([frame(WorkerFailed(rank=0, error=ErrorInfo(type="T", message="m")))], "tag"),
    ([frame(WorkerReady(rank=0, digests_after_warm_up=NO_DIGESTS))], "tag"),
    ([frame(HELLO)], "tag"),
    ([frame(WorkerHello(protocol_version=9, rank=0, pid=0))], "VersionMismatch"),
    ([frame(WorkerHello(protocol_version=PROTOCOL_VERSION, rank=1, pid=0))], "WorkerHello.rank"),
    ([frame(WORKER_HELLO)], "WorkerHello.pid"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("tiny", worker_module="light_worker", max_message_bytes=LIMIT) as running:
        yield running


def refusal(address: str, frames: list[bytes]) -> Refused:
    """Send frames as a stranger; what comes back."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    try:
        socket.send_multipart(frames)
        assert socket.poll(10_000), "no answer"
        _, message = DECODER.decode(socket.recv())
    finally:
        socket.close()
    assert isinstance(message, Refused)
    return message


def names(message: Refused, field: str) -> bool:
    return field in (message.error.type, message.error.facts.get("field"))


@pytest.mark.parametrize(("frames", "field"), TO_CLIENT_SOCKET)
def test_the_client_s_socket(cluster: Cluster, requests: Requests, frames: list[bytes], field: str) -> None:
    answer = refusal(cluster.directory.client_address, frames)
    assert names(answer, field), answer
    assert len(cluster.generate(requests(2))) == 2


@pytest.mark.parametrize(("frames", "field"), TO_WORKER_SOCKET)
def test_the_workers_socket(cluster: Cluster, requests: Requests, frames: list[bytes], field: str) -> None:
    answer = refusal(cluster.directory.worker_address, frames)
    assert names(answer, field), answer
    assert len(cluster.generate(requests(2))) == 2


def test_a_second_worker_of_the_same_rank(cluster: Cluster, requests: Requests) -> None:
    hello = WorkerHello(protocol_version=PROTOCOL_VERSION, rank=0, pid=cluster.worker_pids()[0])
    answer = refusal(cluster.directory.worker_address, [frame(hello)])
    assert names(answer, "WorkerHello.rank")
    assert "rank 0 is connected" in answer.error.message
    assert len(cluster.generate(requests(2))) == 2


@pytest.mark.parametrize("link", ["client_address", "worker_address"])
def test_a_flood_beyond_the_transport_s_limit(cluster: Cluster, requests: Requests, link: str) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(getattr(cluster.directory, link))
    for _ in range(50):
        socket.send(b"\0" * (2 * LIMIT + 1))
        socket.send(b"garbage")
    assert len(cluster.generate(requests(4))) == 4
    socket.close()


def test_each_refusal_is_logged_once_with_the_address(requests: Requests) -> None:
    with Cluster("tiny", worker_module="light_worker") as cluster:
        refusal(cluster.directory.client_address, [b"first"])
        refusal(cluster.directory.worker_address, [b"second"])
        cluster.generate(requests(1))
        log = cluster.directory.log_path("coordinator").read_text()
        assert log.count("refused a frame") == 2
        assert log.count(f"{cluster.directory.client_address}: refused a frame from peer") == 1
        assert log.count(f"{cluster.directory.worker_address}: refused a frame from peer") == 1
