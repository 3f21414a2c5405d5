"""Server-sent events out of a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

DONE = b"[DONE]"
MAX_LINE_BYTES = 16 * 1024 * 1024


class EventSplitter:
    """Cuts a response's bytes, which may break anywhere, into the data of its events.

    Only what OpenAI's interface uses is read: events end with an empty line, one `data:` line each; comments and other
    fields are skipped. Lines end with LF or CRLF.
    """

    def __init__(self) -> None:
        # of the line that is not complete yet
        self._parts: list[bytes] = []
        self._length = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that `received` completes, in order. Raises ValueError for an endless line."""
        if b"\n" not in received:
            self._parts.append(received)
            self._length += len(received)
            if self._length > MAX_LINE_BYTES:
                raise ValueError(f"a line of a stream has more than {MAX_LINE_BYTES} bytes")
            return []
        lines = b"".join([*self._parts, received]).split(b"\n")
        rest = lines.pop()
        self._parts, self._length = [rest], len(rest)
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
