"""A client that stops reading a stream: what waits for it is bounded, nobody else notices, and its stream goes on."""

from __future__ import annotations

import json
import re
import socket
import time
from collections import defaultdict
from typing import Any

from canary import Canary
from server_process import ServerProcess

NUM_CHOICES, NUM_TOKENS = 16, 240
BODY = {
    "messages": [{"role": "user", "content": "It is a truth"}],
    "n": NUM_CHOICES,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "seed": 5,
    "logprobs": True,
    "top_logprobs": 20,
}


def num_generated(server: ServerProcess) -> float:
    found = re.search(r"^\w+:generation_tokens_total\{.*\} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def begin_stream(port: int) -> socket.socket:
    """Ask for the stream on a socket that takes little, and read its header."""
    body = json.dumps(BODY | {"stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    connection.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert connection.recv(15) == b"HTTP/1.1 200 OK"
    return connection


def rest(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(1 << 20):
        received += data
    return received


def choices(stream: bytes) -> list[tuple[str, list[Any], Any]]:
    """Text, log-probabilities and finish reason of each choice, however they were divided into events."""
    chunked = b"\r\n" + stream.partition(b"\r\n\r\n")[2]
    payload = b"".join(re.split(rb"\r\n[0-9a-f]+\r\n", chunked))
    texts: defaultdict[int, str] = defaultdict(str)
    rows: defaultdict[int, list[Any]] = defaultdict(list)
    reasons: dict[int, Any] = {}
    for event in payload.decode().split("\n\n"):
        if not event.startswith("data: {"):
            continue
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            rows[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
            reasons[choice["index"]] = choice["finish_reason"]
    return [(texts[index], rows[index], reasons[index]) for index in sorted(texts)]


def test_what_waits_is_bounded_and_the_stream_goes_on(server: ServerProcess) -> None:
    whole = server.http.post("/v1/chat/completions", json=BODY).json()["choices"]
    expected = [(one["message"]["content"], one["logprobs"]["content"], one["finish_reason"]) for one in whole]
    canary = Canary(server.port, server.process.pid, calls=40)
    before = num_generated(server)
    with begin_stream(server.port) as connection:
        reading = canary.during(lambda: time.sleep(3.0))
        assert reading.problems(canary.baseline) == []
        last = before
        while (now := num_generated(server)) > last:
            last = now
            time.sleep(0.5)
        assert 0 < now - before < NUM_CHOICES * NUM_TOKENS  # the canary's among them
        stream = rest(connection)
    assert choices(stream) == expected
