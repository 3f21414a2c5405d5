"""Pieces of a server's streamed answers; chat with a server."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sempre.engine.cli.answers import Piece
from sempre.engine.cli.arguments import engine_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import Server
from sempre.ipc.errors import ServerError
from sempre.ipc.log_lines import plain

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
# a server that is restarted with a small model is back by then
_PATIENCE_S = 60.0
_PAUSE_S = 0.5
# none: no connection; 503: it starts or ends
_GONE = (None, 503)


def completion_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a completion's chunk."""
    return choice.get("text") or ""


def chat_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a chat's chunk, including reasoning."""
    delta = choice.get("delta") or {}
    return (delta.get("reasoning") or "") + (delta.get("content") or "")


def pieces_of(chunks: Iterable[dict[str, Any]], text_of: Callable[[dict[str, Any]], str]) -> Iterator[Piece]:
    """Yield the pieces of streamed chunks."""
    for chunk in chunks:
        fingerprint = chunk.get("system_fingerprint")
        num_tokens = (chunk.get("usage") or {}).get("completion_tokens")
        for choice in chunk.get("choices") or ():
            yield Piece(text_of(choice), choice.get("seed"), fingerprint, num_tokens)
        if not chunk.get("choices"):
            yield Piece("", None, fingerprint, num_tokens)


def refuse_engine_flags(namespace: argparse.Namespace) -> None:
    """Raise UsageError if flags of an engine are combined with `--url`."""
    given = [f"--{name.replace('_', '-')}" for name in engine_keywords(namespace)]
    if given:
        raise UsageError(f"{', '.join(given)}: set these when you start the server, not with --url")


class RemoteChat:
    """Chats with a server."""

    def __init__(self, server: Server, model: str | None, *, waits: bool = False) -> None:
        """`waits`: if the server is gone before an answer has begun, ask again for up to a minute."""
        self._server = server
        self._body = {"model": server.model(model), **STREAMED}
        self._waits = waits

    def pieces(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> Iterator[Piece]:
        """Yield the answer as it arrives. Raises RequestError, ServerError."""
        body = {**self._body, **sampling, "messages": list(messages)}
        until = time.monotonic() + _PATIENCE_S
        told = has_begun = False
        while True:
            try:
                for piece in pieces_of(self._server.stream("/v1/chat/completions", body), chat_text):
                    has_begun = True
                    yield piece
                return
            except ServerError as error:
                if not self._waits or has_begun or error.status not in _GONE or time.monotonic() > until:
                    raise
                if not told:
                    print(f"sempre: {plain(str(error))}; asking again, Ctrl-C stops", file=sys.stderr)
                told = True
                time.sleep(_PAUSE_S)
