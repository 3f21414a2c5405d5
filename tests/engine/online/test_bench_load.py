"""The load test's client against misbehaving servers: every request ends, and says how."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sempre.engine.cli.bench.load import Endpoint, Outcome, Planned, drive
from sempre.engine.cli.bench.serving_metrics import summarize
from sempre.engine.cli.remote.connection import MAX_LINE_BYTES, EventSplitter

BODY = b'data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY

Connection = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Counts connections and requests; `answer(number of the request, writer)` answers each of a connection."""

    def __init__(self, answer: Callable[[int, asyncio.StreamWriter], Awaitable[bool]]) -> None:
        self._answer = answer
        self.num_connections = self.num_requests = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.rpartition(b"Content-Length: ")[2]))
                self.num_requests += 1
                if not await self._answer(self.num_requests, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()


def outcomes_of(server: Connection, dues: list[float], *, timeout_s: float = 30.0) -> list[Outcome]:
    """One request at a time."""

    async def run() -> list[Outcome]:
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1/completions", {})
        plan = [Planned(b"{}", due) for due in dues]
        try:
            outcomes, _ = await drive(endpoint, plan, 1, lambda: None, timeout_s=timeout_s)
        finally:
            listening.close()
        return outcomes

    return asyncio.run(run())


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def test_connections_are_used_again() -> None:
    async def answer(_: int, writer: asyncio.StreamWriter) -> bool:
        await send(writer, WHOLE)
        return True

    server = Server(answer)
    assert [outcome.error for outcome in outcomes_of(server, [0.0] * 5)] == [""] * 5
    assert (server.num_connections, server.num_requests) == (1, 5)


def test_a_connection_that_was_closed_while_idle_is_not_used_again() -> None:
    async def answer(_: int, writer: asyncio.StreamWriter) -> bool:
        await send(writer, WHOLE)
        return False

    server = Server(answer)
    assert [outcome.error for outcome in outcomes_of(server, [0.0, 0.3, 0.6])] == [""] * 3
    assert (server.num_connections, server.num_requests) == (3, 3)


@pytest.mark.parametrize(
    ("sent", "closes", "error"),
    [
        (b"", True, "the connection was lost"),
        (HEAD, True, "the connection was lost"),
        (HEAD + b"Content-Length: 500\r\n\r\n" + BODY[:20], True, "the connection was lost"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", False, "the response cannot be parsed"),
        (b"SSH-2.0-OpenSSH\r\n", False, "the response cannot be parsed"),
        (HEAD + b"Content-Length: 9\r\n\r\ndata: {x\n", False, "the response cannot be parsed"),
        (b"", False, "no complete response within 0.5 s"),
        (HEAD + b"Content-Length: 500\r\n\r\n" + BODY, False, "no complete response within 0.5 s"),
        (HEAD + b"Content-Length: 0\r\n\r\n", False, "without [DONE]"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", False, "status 500: no"),
    ],
)
def test_a_failure_is_one_outcome_and_nothing_is_sent_twice(sent: bytes, closes: bool, error: str) -> None:
    async def answer(number: int, writer: asyncio.StreamWriter) -> bool:
        await send(writer, sent if number == 2 else WHOLE)
        return not (closes and number == 2)

    server = Server(answer)
    first, second, third = outcomes_of(server, [0.0, 0.0, 0.0], timeout_s=0.5 if "0.5 s" in error else 30.0)
    assert (first.error, third.error) == ("", "")
    assert error in second.error
    assert server.num_requests == 3


def test_an_answer_may_end_with_its_connection() -> None:
    async def answer(_: int, writer: asyncio.StreamWriter) -> bool:
        await send(writer, HEAD + b"Connection: close\r\n\r\n" + BODY)
        return False

    assert [outcome.error for outcome in outcomes_of(Server(answer), [0.0, 0.0])] == ["", ""]


def test_what_was_not_asked_for_ends_the_connection() -> None:
    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await send(writer, WHOLE)
        await server(reader, writer)

    async def answer(_: int, writer: asyncio.StreamWriter) -> bool:
        await send(writer, WHOLE + b"more")
        return True

    server = Server(answer)
    for connection in (talkative, server):
        outcomes = outcomes_of(connection, [0.0, 0.2])
        assert len(outcomes) == 2


def test_nobody_listens() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1/completions", {})
    outcomes, _ = asyncio.run(drive(endpoint, [Planned(b"{}")], None, lambda: None, timeout_s=30.0))
    assert "no connection" in outcomes[0].error


def test_a_line_without_end_is_refused() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"x" * MAX_LINE_BYTES) == []
    with pytest.raises(ValueError, match="a line of a stream"):
        splitter.feed(b"x")


TIMES = st.floats(0.0, 3.0, allow_nan=False)


@given(
    requests=st.lists(
        st.tuples(TIMES, TIMES, st.lists(TIMES, max_size=4), st.integers(1, 50)), min_size=1, max_size=12
    ),
    rest=TIMES,
)
@settings(max_examples=200)
def test_the_peak_is_never_below_the_mean(requests: list[tuple[float, float, list[float], int]], rest: float) -> None:
    outcomes = [
        Outcome(start_time=start, ttft=ttft, itl=gaps, latency=ttft + sum(gaps), output_tokens=tokens)
        for start, ttft, gaps, tokens in requests
    ]
    seconds = max(outcome.start_time + outcome.latency for outcome in outcomes) + rest + 0.001
    result = summarize(outcomes, seconds, [99.0], {})
    assert result["max_output_tokens_per_s"] >= result["output_throughput"]


def test_peaks_count_tokens_and_moments() -> None:
    """Tokens that come together in one event count all; one request after the other is never two at once."""
    one_event = Outcome(start_time=0.0, ttft=0.5, latency=0.5, output_tokens=40)
    assert summarize([one_event], 1.0, [99.0], {})["max_output_tokens_per_s"] == 40.0
    chain = [Outcome(start_time=0.25 * i, ttft=0.25, latency=0.25, output_tokens=1) for i in range(8)]
    assert summarize(chain, 2.0, [99.0], {})["max_concurrent_requests"] == 1
    pairs = [*chain, *chain]
    assert summarize(pairs, 2.0, [99.0], {})["max_concurrent_requests"] == 2
