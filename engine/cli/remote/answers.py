"""Streamed answers at a terminal: the text as it comes, then what is needed to ask for it again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from sempre.ipc.errors import RequestError
from sempre.ipc.log_lines import for_terminal, plain


def completion_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a completion's chunk."""
    return choice.get("text") or ""


def chat_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a chat's chunk; what a model thinks aloud is text, too."""
    delta = choice.get("delta") or {}
    return (delta.get("reasoning") or "") + (delta.get("content") or "")


def print_answer(chunks: Iterable[dict[str, Any]], text_of: Callable[[dict[str, Any]], str]) -> str | None:
    """Print an answer as it comes; return it, or None when the request was refused. An interrupt stops it."""
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
