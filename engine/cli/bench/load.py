"""Sends streamed requests to a server at planned times, and records when each event arrives.

The client must not distort the measurement, so there is one protocol object per connection on a bare event loop, the
response parser is C (httptools), and an event is decoded into at most three fields.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools
import msgspec

from sempre.engine.cli.remote.connection import DONE, EventSplitter


class Usage(msgspec.Struct):
    """Token counts reported by the server."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Delta(msgspec.Struct):
    """The new text of a chat's chunk."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """The text of a chunk."""

    text: str | None = None
    delta: Delta | None = None


class Chunk(msgspec.Struct):
    """One event of a stream; all other fields are skipped."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


# A server may close a longer idle connection just when it is reused.
_MOST_IDLE_S = 2.0
_MOST_REFUSAL_BYTES = 64 * 1024
# left out, or null
_NO_ERROR = (b"", b"null")
_DECODER = msgspec.json.Decoder(Chunk)


@dataclass(slots=True)
class Outcome:
    """Result of one request. Times in seconds; `start_time` on the monotonic clock."""

    start_time: float = 0.0
    client_queue_time: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def success(self) -> bool:
        """Whether the response is complete."""
        return not self.error


class Planned(NamedTuple):
    """A request's body, and when it is due, in seconds from the start."""

    body: bytes
    due: float = 0.0


class Endpoint:
    """The target of requests: its address, and the head of each request."""

    def __init__(self, url: str, headers: dict[str, str], *, verify: ssl.SSLContext | bool = True) -> None:
        """`verify`: True is by the authorities that the system trusts, False not at all."""
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.ssl = None
        if parts.scheme == "https":
            self.ssl = verify if isinstance(verify, ssl.SSLContext) else ssl.create_default_context()
        if self.ssl is not None and verify is False:
            self.ssl.check_hostname = False
            self.ssl.verify_mode = ssl.CERT_NONE
        lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Content-Type: application/json", "Accept: text/event-stream", "Content-Length: "]
        self._head = "\r\n".join(lines).encode()

    def request(self, body: bytes) -> bytes:
        """Return the bytes of a request."""
        return b"%s%d\r\n\r\n%s" % (self._head, len(body), body)


class _Connection(asyncio.Protocol):
    """One connection; one request at a time. Unusable once `is_open` is false."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None
        self.is_open = False
        self.idle_since = 0.0

    async def exchange(self, request: bytes, outcome: Outcome) -> None:
        """Send a request, and fill in its outcome."""
        assert self._transport is not None
        self._ended = asyncio.get_running_loop().create_future()
        self._outcome = outcome
        self._parser = httptools.HttpResponseParser(self)
        self._splitter = EventSplitter()
        self._refusal = b""
        self._events = 0
        self._done = False
        self._last = outcome.start_time
        self._transport.write(request)
        try:
            await self._ended
        finally:
            self._ended = None
            self.idle_since = time.perf_counter()

    def close(self) -> None:
        """Close the connection, even during a request."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._ended is not None:
            # a response without a length ends with its connection
            if not self._done:
                self._outcome.error = (
                    self._outcome.error or f"the connection was lost: {error or 'closed by the server'}"
                )
            self._finish()

    def data_received(self, data: bytes) -> None:
        if self._ended is None:
            self.close()  # data without a request
            return
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # An error raised in a callback is the context.
            self._outcome.error = f"the response cannot be parsed: {error.__context__ or error}"
            self.close()
            self._finish()

    def _finish(self) -> None:
        outcome = self._outcome
        outcome.latency = self._last - outcome.start_time
        outcome.output_tokens = outcome.output_tokens or self._events
        if not self._events and not outcome.error:
            outcome.error = "the response contains no token"
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    # called by the parser
    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            if len(self._refusal) < _MOST_REFUSAL_BYTES:
                self._refusal += body
            return
        outcome = self._outcome
        for event in self._splitter.feed(body):
            if event == DONE:
                self._done = True
                continue
            chunk = _DECODER.decode(event)
            error = bytes(chunk.error)
            if error not in _NO_ERROR:
                outcome.error = error.decode(errors="replace")
            if chunk.usage is not None:
                outcome.prompt_tokens = chunk.usage.prompt_tokens
                outcome.output_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                self._note(choice)

    def _note(self, choice: Choice) -> None:
        outcome = self._outcome
        delta = choice.delta
        text = choice.text if delta is None else (delta.reasoning or "") + (delta.content or "")
        if not text and delta is not None and delta.role is not None:
            return  # the event that opens a chat holds no token
        if text:
            outcome.text.append(text)
        if self._events:
            outcome.itl.append(self._now - self._last)
        else:
            outcome.ttft = self._now - outcome.start_time
        self._events += 1
        self._last = self._now

    # called by the parser
    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            return
        if status != 200:
            self._outcome.error = f"status {status}: {self._refusal.decode(errors='replace')[:500]}"
        elif not self._done and not self._outcome.error:
            self._outcome.error = "the stream ended without [DONE]"
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()


class _Client:
    """Reusable connections to one server."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._free: list[_Connection] = []

    async def send(self, body: bytes, waited: float) -> Outcome:
        """Send a request once: no retries, since the server may have begun to answer."""
        outcome = Outcome(start_time=time.perf_counter(), client_queue_time=waited)
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._idle_connection() or await self._connect()
                await connection.exchange(self._endpoint.request(body), outcome)
        except TimeoutError:
            outcome.error = f"no complete response within {self._timeout_s:g} s"
        except (OSError, UnicodeError) as error:
            outcome.error = f"no connection: {error}"
        if connection is not None and connection.is_open:
            if outcome.error:
                connection.close()
            else:
                self._free.append(connection)
        return outcome

    def _idle_connection(self) -> _Connection | None:
        while self._free:
            connection = self._free.pop()
            if connection.is_open and time.perf_counter() - connection.idle_since < _MOST_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        where = self._endpoint
        _, connection = await loop.create_connection(_Connection, where.host, where.port, ssl=where.ssl)
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection.close()


async def drive(
    endpoint: Endpoint,
    plan: Sequence[Planned],
    max_concurrency: int | None,
    progress: Callable[[], object],
    *,
    timeout_s: float,
) -> tuple[list[Outcome], float]:
    """Send each request when it is due, or later if `max_concurrency` are running; return outcomes and seconds.

    `timeout_s` covers a request from sending to its last byte, including connecting.
    """
    _allow_connections(max_concurrency or len(plan))
    client = _Client(endpoint, timeout_s)
    places = asyncio.Semaphore(max_concurrency or len(plan) or 1)
    began = time.perf_counter()

    async def one(planned: Planned) -> Outcome:
        await asyncio.sleep(max(0.0, began + planned.due - time.perf_counter()))
        queued = time.perf_counter()
        async with places:
            outcome = await client.send(planned.body, time.perf_counter() - queued)
        progress()
        return outcome

    outcomes = await asyncio.gather(*(one(planned) for planned in plan))
    seconds = time.perf_counter() - began
    client.close()
    return outcomes, seconds


def _allow_connections(count: int) -> None:
    """Raise the process's limit of open files if it is too low and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
