"""Server-sent events out of a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

DONE = b"[DONE]"


class EventSplitter:
    """Cuts a response's bytes, which may break anywhere, into the data of its events.

    Only what OpenAI's interface uses is read: events end with an empty line, one `data:` line each; comments and other
    fields are skipped. Lines end with LF or CRLF.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that `received` completes, in order."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
