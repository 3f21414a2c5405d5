"""`sempre chat --url`: a conversation with the model of a running server."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from sempre.engine.cli.arguments import engine_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.answers import chat_text, print_answer
from sempre.engine.cli.remote.connection import Server


def refuse_engine_flags(namespace: argparse.Namespace) -> None:
    """Raise UsageError when flags of an engine are given beside `--url`."""
    given = [f"--{name.replace('_', '-')}" for name in engine_keywords(namespace)]
    if given:
        raise UsageError(f"{', '.join(given)}: set where the server is started, not with --url")


class RemoteChat:
    """Asks a server; has the shape of a conversation's other partner, an engine of one's own."""

    def __init__(self, server: Server, model: str | None, sampling: Mapping[str, Any]) -> None:
        self._server = server
        self._body = {"model": server.model(model), "stream": True, **sampling}

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Print the answer as it comes; return it, or None when the request was refused."""
        body = {**self._body, "messages": list(messages)}
        return print_answer(self._server.stream("/v1/chat/completions", body), chat_text)
