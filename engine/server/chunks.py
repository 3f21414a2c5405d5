"""Chunks of a stream: what stays the same is encoded once per request, so a token costs one small encoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from sempre.engine.server.requests import StreamOptions
from sempre.engine.server.responses import ChatChunkChoice, CompletionChoice, Usage

_ENCODER = msgspec.json.Encoder()
_MARK = "\0"
_ENCODED_MARK = _ENCODER.encode(_MARK)


class _Frame(NamedTuple):
    """An event without its text."""

    before: bytes
    behind: bytes


class ChunkEncoder:
    """Encodes one choice at a time as `data: {"id":…,"choices":[…],"system_fingerprint":…}`."""

    def __init__(
        self, *, response_id: str, kind: str, created: int, model: str, fingerprint: str, options: StreamOptions | None
    ) -> None:
        head = {"id": response_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + _ENCODER.encode(head)[:-1] + b',"choices":['
        self._fingerprint = b'],"system_fingerprint":' + _ENCODER.encode(fingerprint)
        self.include_usage = options is not None and options.include_usage
        self.continuous_usage = options is not None and options.continuous_usage_stats
        self._frames: dict[int, _Frame] = {}
        self._tail = self._fingerprint + (b',"usage":null}\n\n' if self.include_usage else b"}\n\n")

    def choice(self, choice: CompletionChoice | ChatChunkChoice, usage: Usage | None = None) -> bytes:
        """Return the event of one choice."""
        tail = self._tail if usage is None else self._usage_tail(usage)
        return self._head + _ENCODER.encode(choice) + tail

    def text(self, index: int, text: str, choice_of: Callable[[str], CompletionChoice | ChatChunkChoice]) -> bytes:
        """Return the event of `choice_of(text)`, of which nothing else differs between calls for choice `index`; the
        text must stand in it once."""
        frame = self._frames.get(index)
        if frame is None:
            before, _, behind = self.choice(choice_of(_MARK)).rpartition(_ENCODED_MARK)
            frame = self._frames[index] = _Frame(before, behind)
        return frame.before + _ENCODER.encode(text) + frame.behind

    def usage(self, usage: Usage) -> bytes:
        """Return the event that ends a stream with its usage."""
        return self._head + self._usage_tail(usage)

    def _usage_tail(self, usage: Usage) -> bytes:
        return self._fingerprint + b',"usage":' + _ENCODER.encode(usage) + b"}\n\n"
