"""Streamed answers at a terminal: the text as it arrives, then the seed and fingerprint to reproduce it; chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sempre.engine.cli.arguments import engine_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import Server
from sempre.ipc.errors import RequestError
from sempre.ipc.log_lines import for_terminal, plain


def completion_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a completion's chunk."""
    return choice.get("text") or ""


def chat_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a chat's chunk, including reasoning."""
    delta = choice.get("delta") or {}
    return (delta.get("reasoning") or "") + (delta.get("content") or "")


def print_answer(chunks: Iterable[dict[str, Any]], text_of: Callable[[dict[str, Any]], str]) -> str | None:
    """Print an answer as it arrives; return it, or None if the request was refused. An interrupt stops it."""
    pieces: list[str] = []
    known: dict[str, Any] = {}
    try:
        for chunk in chunks:
            known |= {"fingerprint": chunk["system_fingerprint"]} if chunk.get("system_fingerprint") else {}
            for choice in chunk.get("choices") or ():
                known |= {"seed": choice["seed"]} if choice.get("seed") is not None else {}
                pieces.append(text_of(choice))
                print(for_terminal(pieces[-1], sys.stdout), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"sempre: error: {plain(str(error))}", file=sys.stderr)
        return None
    print(flush=True)
    if sys.stderr.isatty() and known:
        facts = ", ".join(f"{name} {value}" for name, value in known.items())
        print(f"[{plain(facts)}]", file=sys.stderr)
    return "".join(pieces)


def refuse_engine_flags(namespace: argparse.Namespace) -> None:
    """Raise UsageError if flags of an engine are combined with `--url`."""
    given = [f"--{name.replace('_', '-')}" for name in engine_keywords(namespace)]
    if given:
        raise UsageError(f"{', '.join(given)}: set these when you start the server, not with --url")


class RemoteChat:
    """Chats with a server; has the same interface as chatting with an own engine."""

    def __init__(self, server: Server, model: str | None, sampling: Mapping[str, Any]) -> None:
        self._server = server
        self._body = {"model": server.model(model), "stream": True, **sampling}

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Print the answer as it arrives; return it, or None if the request was refused."""
        body = {**self._body, "messages": list(messages)}
        return print_answer(self._server.stream("/v1/chat/completions", body), chat_text)
