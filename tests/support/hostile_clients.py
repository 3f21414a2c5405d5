"""Clients that misuse connections and headers, on raw sockets. Each takes a port and returns the bytes that it sent."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

_PATIENCE_S = 30.0


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A connection that waits a while for whatever is asked of it, and not for ever."""
    with socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as connection:
        yield connection


def flood(port: int, head: bytes, piece: bytes, num_bytes: int) -> int:
    """Send `head` and then `piece` again and again, until `num_bytes` are sent or the server closes."""
    sent = 0
    with connected(port) as connection, suppress(OSError):
        connection.sendall(head)
        while sent < num_bytes:
            connection.sendall(piece)
            sent += len(piece)
        answer(connection)
    return 0


def answer(connection: socket.socket) -> bytes:
    """Return what comes until the server closes, or nothing comes for some seconds."""
    received = b""
    connection.settimeout(5)
    with suppress(OSError):
        while data := connection.recv(65536):
            received += data
    return received


def endless_header(port: int) -> int:
    """One header whose value has no end: 60 MB."""
    return flood(port, b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: ", b"a" * 65536, 60_000_000)


def endless_headers(port: int) -> int:
    """Headers without end, each of them short: 60 MB."""
    return flood(port, b"GET /health HTTP/1.1\r\nHost: a\r\n", b"A: b\r\n" * 10_000, 60_000_000)


def endless_target(port: int) -> int:
    """A request line without end: 60 MB."""
    return flood(port, b"GET /", b"a" * 65536, 60_000_000)


def half_headers(port: int) -> int:
    """200 connections that each hold half a header."""
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(connected(port))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Half: ")
        time.sleep(3)
    return 0


def held_bodies(port: int) -> int:
    """20 bodies of 31 MB, each held one byte before its end."""
    with ExitStack() as stack, suppress(OSError):
        size = 31_000_000
        for _ in range(20):
            connection = stack.enter_context(connected(port))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % size)
            with suppress(OSError):
                connection.sendall(b'{"prompt": "' + b"a" * (size - 13))
        time.sleep(3)
    return 0


ATTACKS: dict[str, Callable[[int], int]] = {
    attack.__name__: attack for attack in (endless_header, endless_headers, endless_target, half_headers, held_bodies)
}
