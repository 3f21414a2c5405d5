"""What clients may send and how long they may take, on a real server; and that nobody else notices when they exceed
it."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import hostile_clients
import httpx2
import pytest
from canary import Canary
from hostile_clients import ATTACKS, GET, POST, answer, connected
from server_process import ServerProcess

FLAGS = ("--max-model-len", "512", "--max-num-seqs", "8", "--num-threads", "1")
LIMITS = ("--header-timeout", "1", "--body-timeout", "1", "--max-connections-per-address", "160")
CALLS = 40
BODY = b'{"prompt": "It is", "max_tokens": 1}'


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", *FLAGS, *LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def canary(bounded: ServerProcess) -> Canary:
    return Canary(bounded.port, bounded.process.pid, calls=CALLS)


def status_and_message(received: bytes) -> tuple[int, str]:
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    status = int(head.split()[1])
    assert error["code"] == status
    return status, error["message"]


@pytest.mark.parametrize("name", ATTACKS)
def test_nobody_else_notices(bounded: ServerProcess, canary: Canary, name: str) -> None:
    """Neither in the time of the event loop, nor in waiting, nor in memory; new connections get in."""
    held = []
    reading = canary.during(lambda: held.append(ATTACKS[name](bounded.port)))
    assert reading.problems(canary.baseline, held[0]) == []
    assert bounded.process.poll() is None


def test_the_canary_notices(bounded: ServerProcess) -> None:
    """The control: a server that is stopped for a while is told from one that is not."""
    canary = Canary(bounded.port, bounded.process.pid, calls=CALLS)

    def stop() -> None:
        bounded.process.send_signal(19)
        time.sleep(canary.baseline.slowest_s + 3.5)
        bounded.process.send_signal(18)

    assert any("a call took" in problem for problem in canary.during(stop).problems(canary.baseline))


@pytest.mark.parametrize(
    ("beginning", "piece", "status", "message"),
    [
        (GET + b"X-A: ", b"a" * 4096, 431, "65536 bytes"),
        (b"GET /", b"a" * 4096, 431, "65536 bytes"),
        (GET, b"A: b\r\n", 431, "100 header fields"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n", 431, "100 header fields"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 500, 400, "larger chunks"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2;a=", b"a" * 4096, 400, "around its chunks"),
        (b"", b"\r\n" * 500, 400, "No request has begun"),
        (b"no HTTP at all\r\n\r\n", b"", 400, "not a valid HTTP"),
    ],
)
def test_too_much(bounded: ServerProcess, beginning: bytes, piece: bytes, status: int, message: str) -> None:
    received = hostile_clients.flood(bounded.port, beginning, piece or b"a", 2_000_000)
    assert status_and_message(received)[0] == status
    assert message in status_and_message(received)[1]


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (GET + b"X-Half", "The header did not come within 1 s."),
        (POST + b"Content-Length: 10\r\n\r\n12345", "The body did not come within 1 s."),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "The body did not come within 1 s."),
    ],
)
def test_too_slow(bounded: ServerProcess, beginning: bytes, message: str) -> None:
    with connected(bounded.port) as connection:
        connection.sendall(beginning)
        assert status_and_message(answer(connection)) == (408, message)


def test_whoever_says_nothing_is_closed(bounded: ServerProcess) -> None:
    with connected(bounded.port) as connection:
        assert connection.recv(1) == b""


def test_a_header_of_an_ordinary_size_passes(bounded: ServerProcess) -> None:
    fields = b"".join(b"X-%d: %b\r\n" % (number, b"a" * 500) for number in range(90))
    with connected(bounded.port) as connection:
        connection.sendall(GET + fields + b"Connection: close\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200")


def test_expect_continue(bounded: ServerProcess) -> None:
    """The client is asked for the body when the header is valid; otherwise it is refused at once."""
    length = b"Content-Length: %d\r\n" % len(BODY)
    with connected(bounded.port) as connection:
        connection.sendall(POST + length + b"Connection: close\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert answer(connection).startswith(b"HTTP/1.1 200")
    with connected(bounded.port) as connection:
        connection.sendall(POST.replace(b"json", b"yaml") + length + b"Expect: 100-continue\r\n\r\n")
        received = answer(connection)
    assert received.startswith(b"HTTP/1.1 415")
    assert b"100 Continue" not in received


def test_a_few_requests_may_be_sent_ahead(bounded: ServerProcess) -> None:
    last = GET + b"Connection: close\r\n\r\n"
    with connected(bounded.port) as connection:
        connection.sendall((GET + b"\r\n") * 7 + last)
        assert answer(connection).count(b"HTTP/1.1 200") == 8
    with connected(bounded.port) as connection:
        connection.sendall((GET + b"\r\n") * 100 + last)
        assert answer(connection).count(b"HTTP/1.1 200") < 100


def test_the_refused_are_counted_in_one_line(bounded: ServerProcess) -> None:
    before = len(bounded.log.splitlines())
    for _ in range(30):
        hostile_clients.flood(bounded.port, b"nonsense\r\n\r\n", b"a", 1)
    while not any("connections refused" in line for line in bounded.log.splitlines()[before:]):
        time.sleep(0.1)
    assert len([line for line in bounded.log.splitlines()[before:] if "GET" not in line and "POST" not in line]) <= 3


def test_256_streams_from_one_address(server: ServerProcess) -> None:
    """With the settings that a server has by default."""
    body = json.dumps({"prompt": "It is", "max_tokens": 4, "stream": True, "ignore_eos": True}).encode()
    head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(server.port)) for _ in range(256)]
        for connection in connections:
            connection.sendall(head + body)
        answers = [answer(connection, 120) for connection in connections]
    assert sum(b"data: [DONE]" in found for found in answers) == 256


def test_a_kept_connection_serves_many_requests(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        file = connection.makefile("rb")
        for _ in range(300):
            connection.sendall(GET + b"\r\n")
            assert file.readline().startswith(b"HTTP/1.1 200")
            length = 0
            while (line := file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length"):
                    length = int(line.split(b":")[1])
            file.read(length)


def test_a_large_body_that_is_refused_is_answered(bounded: ServerProcess) -> None:
    """Also to a client that is still sending."""
    body = b'{"prompt": "' + b"a" * 60_000_000 + b'"}'
    with httpx2.Client(base_url=bounded.url, timeout=60) as http:
        answered = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answered.status_code == 413


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_request_writes_a_line_of_its_own(tmp_path: Path, log_format: str) -> None:
    """In a path, a header or a field; in the access log, the log of requests, or an error."""
    forged = "2026-11-28T00:00:00Z INFO forged \x1b[2J\u2028\u202e"
    with ServerProcess(
        tmp_path / "log", *FLAGS, "--enable-log-requests", "--log-format", log_format, "--debug"
    ) as server:
        target = quote("/x\n" + forged + "\r" + "\x9b").encode()
        for head in (
            GET.replace(b"/health", target),
            GET + b"X-Request-Id: a\x1b[2J\r\nX-A: " + forged.encode() + b"\r\n",
        ):
            with connected(server.port) as connection:
                connection.sendall(head + b"Connection: close\r\n\r\n")
                answer(connection)
        assert (
            server.complete(prompt="\n" + forged, max_tokens=1, stop=["\x1b\n" + forged], user=forged).status_code < 500
        )
        assert server.complete(prompt="a", max_tokens=1, stop=["\x07" * 4_000_000]).status_code < 500
        assert server.complete(**{"prompt": "a", "\n" + forged: 1}).status_code == 400
        assert server.complete(prompt="a", model="\n" + forged).status_code == 404
        lines = server.log_path.read_bytes().decode().split("\n")
    assert sum("forged" in line for line in lines) >= 2
    for line in lines:
        assert line.isprintable()
        assert len(line) < 200_000
        assert re.match(r"\{|  |$" if log_format == "json" else r"20[-\d]+T[\d:]+Z [A-Z]+ |  |$", line), line


def run_mutations(server: ServerProcess, seed: int, count: int) -> None:
    for request in hostile_clients.mutations(seed, count):
        with connected(server.port) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            received = answer(connection)
        assert not received.startswith(b"HTTP/1.1 5"), (request, received)


def test_headers_that_nobody_foresaw(bounded: ServerProcess, canary: Canary) -> None:
    """Never a 5xx, and nobody else notices."""
    reading = canary.during(lambda: run_mutations(bounded, seed=1, count=300))
    assert reading.problems(canary.baseline) == []


@pytest.mark.soak
def test_many_headers_that_nobody_foresaw(bounded: ServerProcess, canary: Canary) -> None:
    threads = [threading.Thread(target=run_mutations, args=(bounded, seed, 10_000)) for seed in range(4)]

    def attack() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert canary.during(attack).problems(canary.baseline) == []
