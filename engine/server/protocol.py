"""HTTP on one connection, with limits on what a client may send and how long it may take.

uvicorn's protocol reads headers of any length, for any time. Here a header may have 64 KiB, 100 fields and
`header_timeout`, a body `body_timeout`, responses must be read, and only a few requests may be sent ahead.
Beyond a limit, the client gets a status and a message, if still possible, and the connection is closed.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from sempre.engine.server.connections import UNCOUNTED_BYTES, ConnectionGuard, peer_address
from sempre.engine.server.errors import APIError, BadRequest

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_FIELDS = 100
# The parser cannot stop in the middle of its input, so it gets little at a time.
_SLICE_BYTES = 16 * 1024
_MOST_AHEAD = 16
# A body in tiny pieces is expensive; this many pieces are always allowed, plus one per 64 bytes.
_FREE_PIECES = 4096
_PIECE_BYTES = 64
# of a message outside its body: chunk sizes and the syntax around them
_FRAMING_BYTES = 64 * 1024
_BETWEEN_BYTES = 1024
# Input after the response is still read, so that the client can read the response.
_DISCARD_S = 2.0
_DISCARD_BYTES = 64 * 2**20
_MOST_LEFT_BYTES = 2**20


class BoundedProtocol(HttpToolsProtocol):
    """One connection; all connections share `guard`."""

    def __init__(self, guard: ConnectionGuard, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._guard = guard
        self.address: str | None = None
        self.held_bytes = 0
        self.has_been_served = False
        self.is_receiving = False
        self._in_head = False
        self._raw_bytes = 0
        self._num_fields = 0
        self._body_bytes = 0
        self._num_pieces = 0
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._closing = False
        self._discarded = 0
        self._deadline = math.inf
        self._write_deadline = math.inf

    def connection_made(self, transport: Any) -> None:
        """Admit the client if there is room."""
        super().connection_made(transport)
        self.address = peer_address(self.client[0] if self.client is not None else None)
        refusal = self._guard.admit(self)
        if refusal is not None:
            self._guard.note(refusal)
            self._write(refusal)
            self._close()
            return
        self._deadline = self.loop.time() + self._guard.header_timeout

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._closing = True
        self._guard.forget(self)
        self._end_requests()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data up to the first violation."""
        for start in range(0, len(data), _SLICE_BYTES):
            piece = data[start : start + _SLICE_BYTES]
            if self._closing:
                self._discard(len(piece))
                continue
            self._unset_keepalive_if_required()
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserError:
                self.refuse(BadRequest("This is not a valid HTTP request."))
            except httptools.HttpParserUpgrade:
                # ignore the request for another protocol
                pass
            self._count(len(piece))

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._closing:
            return
        super().on_message_begin()
        self._in_head = True
        self._raw_bytes = self._num_fields = self._body_bytes = self._num_pieces = 0
        self._set_deadline()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the header, or of the trailer after a chunked body."""
        if self._closing:
            return
        self._num_fields += 1
        if self._num_fields > MAX_HEADER_FIELDS:
            self._refuse_head(f"A request must not have more than {MAX_HEADER_FIELDS} header fields.")
        elif self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The header is complete."""
        if self._closing:
            return
        if len(self.pipeline) >= _MOST_AHEAD:
            self.refuse(BadRequest(f"At most {_MOST_AHEAD} requests may be sent ahead of their answers."))
            return
        self._in_head = False
        self.is_receiving = True
        # set before the application can start, which releases it after reading the body
        self.scope["state"]["release_body"] = self._release_body
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        if self.parser.should_upgrade():
            # the following data would belong to the other protocol
            self.cycle.keep_alive = False
        self._set_deadline()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._closing:
            return
        before = self._body_bytes
        self._body_bytes += len(body)
        self._num_pieces += 1
        if not self._unanswered:
            if self._body_bytes > _MOST_LEFT_BYTES:
                self._close()
        elif self._num_pieces > _FREE_PIECES + self._body_bytes // _PIECE_BYTES:
            self.refuse(BadRequest(f"The body came in {self._num_pieces} pieces; send it in larger chunks."))
        else:
            super().on_body(body)
            if self._body_bytes > UNCOUNTED_BYTES:
                self._guard.hold(self, self._body_bytes - max(before, UNCOUNTED_BYTES))

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._closing:
            return
        self.is_receiving = False
        self._raw_bytes = -_SLICE_BYTES  # the rest of this slice may belong to this message
        super().on_message_complete()
        if self._unanswered:
            self._guard.serve(self)
            self.has_been_served = True
        self._set_deadline()

    def on_response_complete(self) -> None:
        """A response has been written."""
        self._unanswered.popleft()
        self._release_body()
        super().on_response_complete()
        if not self._unanswered and not self._closing:
            self._guard.wait(self)
            if self.is_receiving and self.expect_100_continue:
                # the client may send either the body or its next request
                self._close()
        self._set_deadline()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes."""
        self._write_deadline = self.loop.time() + self._guard.body_timeout
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self._write_deadline = math.inf
        super().resume_writing()

    def expire(self, now: float) -> None:
        """End the connection if a deadline has passed."""
        if now >= self._write_deadline or (now >= self._deadline and self.transport.is_closing()):
            self._abort()
        elif now < self._deadline:
            pass
        elif self._in_head:
            self.refuse(APIError(408, f"The header did not come within {self._guard.header_timeout:g} s."))
        elif self._unanswered and not self._closing:
            self.refuse(APIError(408, f"The body did not come within {self._guard.body_timeout:g} s."))
        else:
            self._close()

    def refuse(self, error: APIError) -> None:
        """Respond with `error` instead of the application, and close the connection."""
        if self._closing or self.transport.is_closing():
            return
        self._guard.note(error)
        is_answered = self._unanswered and (not self.is_receiving or self.cycle.response_started)
        for cycle in self._unanswered:
            cycle.scope["state"]["refused_with"] = error.status
        self._end_requests()
        self._closing = True
        self._in_head = self.is_receiving = False
        self._guard.release(self)
        if is_answered or len(self._unanswered) > 1:
            self._abort()
            return
        # refused connections are the first to be closed for others
        self._guard.serve(self)
        self.has_been_served = False
        self._guard.wait(self)
        self._write(error)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.time() + _DISCARD_S

    def make_room(self, error: APIError) -> None:
        """Close the connection at once, with `error` if a request has begun."""
        if self._closing or not (self._in_head or self._unanswered):
            self._abort()
        else:
            self.refuse(error)
            self._close()

    def _count(self, num_bytes: int) -> None:
        """Count the bytes just parsed, all of them for the current request."""
        self._raw_bytes += num_bytes
        if self._closing:
            return
        if self._in_head:
            if self._raw_bytes >= MAX_HEADER_BYTES:
                self._refuse_head(f"The header must not exceed {MAX_HEADER_BYTES} bytes.")
        elif self.is_receiving:
            if self._raw_bytes > 2 * self._body_bytes + MAX_HEADER_BYTES + _FRAMING_BYTES:
                self.refuse(BadRequest("The body has more bytes around its chunks than in them."))
        elif self._raw_bytes > _BETWEEN_BYTES and not self._unanswered:
            self.refuse(BadRequest("No request has begun."))

    def _refuse_head(self, text: str) -> None:
        self.refuse(APIError(431, text))

    def _write(self, error: APIError) -> None:
        body = error.encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in {**fields, **error.headers}.items()]
        self.transport.write(STATUS_LINE[error.status] + b"".join(lines) + b"\r\n" + body)

    def _discard(self, num_bytes: int) -> None:
        self._discarded += num_bytes
        if self._discarded > _DISCARD_BYTES:
            self._close()

    def _close(self) -> None:
        """Close once all data is sent, within `body_timeout`."""
        self._closing = True
        if not self.transport.is_closing():
            self.transport.close()
        self._deadline = self.loop.time() + self._guard.body_timeout

    def _abort(self) -> None:
        self._closing = True
        self._end_requests()
        self.transport.abort()

    def _end_requests(self) -> None:
        """Tell the application that the client left, also for pipelined requests, which uvicorn would keep writing."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.body = bytearray()
            cycle.message_event.set()

    def _release_body(self) -> None:
        self._guard.release(self)

    def _set_deadline(self) -> None:
        guard = self._guard
        if self._closing:
            return
        if len(self._unanswered) > 1 or (self._unanswered and not self.is_receiving):
            seconds = math.inf
        elif self.transport.is_closing():
            seconds = guard.body_timeout
        elif self._in_head:
            seconds = guard.header_timeout
        elif self.is_receiving:
            seconds = guard.body_timeout if self._unanswered else _DISCARD_S
        else:
            seconds = guard.idle_timeout
        self._deadline = self.loop.time() + seconds
