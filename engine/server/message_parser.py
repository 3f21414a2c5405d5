"""From generated text to the parts of a chat message.

Streamed and whole responses use the same parser, so they contain the same message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET

from sempre.engine.parsing import Arguments, CallStart, Content, OutputParser, Piece, Reasoning
from sempre.engine.parsing.reasoning import ReasoningCounter
from sempre.engine.server.responses import ChatDelta, ChatMessage, ToolCall, ToolCallFunction


class MessageParser(Protocol):
    """Reads one choice. Text that may still become something else is held back until the end.

    Take it as pieces (`pieces`, then `last_pieces`) or as deltas of a chat message (`feed`, then `finish`).
    """

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of tokens before the answer."""

    def pieces(self, text: str, token_ids: Sequence[int]) -> list[Piece]:
        """Add generated text; return the pieces that are certain."""

    def last_pieces(self) -> list[Piece]:
        """Return the pieces that were held back."""

    def call_id(self, index: int, prefix: str = "call_") -> str:
        """Return the id of a tool call."""

    def feed(self, text: str, token_ids: Sequence[int]) -> ChatDelta:
        """Add generated text; return what it adds to the message."""

    def finish(self, finish_reason: str) -> tuple[ChatDelta, str]:
        """Return what was held back, and the finish reason to report (`tool_calls` instead of `stop`)."""


class PlainContent:
    """All text is content."""

    num_reasoning_tokens = 0

    def pieces(self, text: str, token_ids: Sequence[int]) -> list[Piece]:
        return [Content(text)] if text else []

    def last_pieces(self) -> list[Piece]:
        return []

    def call_id(self, index: int, prefix: str = "call_") -> str:
        raise AssertionError("plain content has no calls")

    def feed(self, text: str, token_ids: Sequence[int]) -> ChatDelta:
        return ChatDelta(content=text)

    def finish(self, finish_reason: str) -> tuple[ChatDelta, str]:
        return ChatDelta(), finish_reason


class ParsedContent:
    """Reasoning, tool calls and content."""

    def __init__(
        self,
        parser: OutputParser,
        *,
        id_prefix: str,
        short_ids: bool = False,
        reports_calls: bool,
        include_reasoning: bool,
        has_content: bool = True,
        counter: ReasoningCounter | None = None,
    ) -> None:
        """Tool call ids derive from `id_prefix`; `short_ids` have nine letters and digits.

        `reports_calls`: a choice with calls has finish reason `tool_calls`. Without `has_content`, text outside calls
        is the beginning of a call that was cut off.
        """
        self._counter = counter
        self._parser = parser
        self._id_prefix = id_prefix
        self._short_ids = short_ids
        self._reports_calls = reports_calls
        left_out = ((Content, has_content), (Reasoning, include_reasoning))
        self._left_out = tuple(kind for kind, is_told in left_out if not is_told)
        self._num_calls = 0

    @property
    def num_reasoning_tokens(self) -> int:
        return 0 if self._counter is None else self._counter.count

    def pieces(self, text: str, token_ids: Sequence[int]) -> list[Piece]:
        if self._counter is not None:
            self._counter.push(token_ids)
        return self._told(self._parser.feed(text))

    def last_pieces(self) -> list[Piece]:
        return self._told(self._parser.finish())

    def call_id(self, index: int, prefix: str = "call_") -> str:
        digest = hashlib.sha256(f"{self._id_prefix}/{index}".encode()).hexdigest()
        return digest[:9] if self._short_ids else prefix + digest[:24]

    def feed(self, text: str, token_ids: Sequence[int]) -> ChatDelta:
        return self._delta(self.pieces(text, token_ids))

    def finish(self, finish_reason: str) -> tuple[ChatDelta, str]:
        delta = self._delta(self.last_pieces())
        if finish_reason == "stop" and self._num_calls and self._reports_calls:
            finish_reason = "tool_calls"
        return delta, finish_reason

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if not isinstance(piece, self._left_out)] if self._left_out else pieces

    def _delta(self, pieces: Sequence[Piece]) -> ChatDelta:
        """The pieces as one delta."""
        delta = ChatDelta()
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        if content:
            delta.content = content
        if reasoning:
            delta.reasoning = delta.reasoning_content = reasoning
        calls: dict[int, ToolCall] = {}
        arguments: dict[int, list[str]] = {}
        for piece in pieces:
            if isinstance(piece, CallStart):
                self._num_calls += 1
                function = ToolCallFunction(piece.name, "")
                calls[piece.index] = ToolCall(function, self.call_id(piece.index), "function", piece.index)
            elif isinstance(piece, Arguments):
                calls.setdefault(piece.index, ToolCall(ToolCallFunction(), index=piece.index))
                arguments.setdefault(piece.index, []).append(piece.text)
        for index, texts in arguments.items():
            calls[index].function.arguments = "".join(texts)
        if calls:
            delta.tool_calls = list(calls.values())
        return delta


def message_of(deltas: Sequence[ChatDelta], role: str) -> ChatMessage:
    """Return the message assembled from the deltas of a stream."""
    content = [delta.content for delta in deltas if isinstance(delta.content, str)]
    reasoning = [delta.reasoning for delta in deltas if isinstance(delta.reasoning, str)]
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        for part in delta.tool_calls or []:
            _add_call(calls, part)
    joined = "".join(content)
    thought = "".join(reasoning) if reasoning else None
    return ChatMessage(
        role=role,
        content=joined if joined or not (calls or reasoning) else None,
        reasoning=thought,
        reasoning_content=thought,
        tool_calls=list(calls.values()) or UNSET,
    )


def _add_call(calls: dict[int, ToolCall], part: ToolCall) -> None:
    index = part.index or 0
    whole = calls.get(index)
    if whole is None:
        calls[index] = ToolCall(function=msgspec.structs.replace(part.function), id=part.id, type=part.type)
    else:
        whole.function.name = whole.function.name or part.function.name
        whole.function.arguments = (whole.function.arguments or "") + (part.function.arguments or "")
