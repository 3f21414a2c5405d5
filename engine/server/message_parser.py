"""From generated text to the parts of a chat message: the seam for tool calls and reasoning.

A streamed answer and a whole one go through the same parser, so they hold the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET

from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.responses import ChatDelta, ChatMessage, ToolCall


class MessageParser(Protocol):
    """Reads one choice. Text that may still become something else is held back until `finish`."""

    def feed(self, text: str, token_ids: Sequence[int]) -> ChatDelta:
        """Take what was generated next; return what it adds to the message."""

    def finish(self, finish_reason: str) -> tuple[ChatDelta, str]:
        """Return what was held back, and the finish reason to report (`tool_calls` in place of `stop`)."""


ParserFactory = Callable[[ChatCompletionRequest], MessageParser]


class PlainContent:
    """All text is content."""

    def feed(self, text: str, token_ids: Sequence[int]) -> ChatDelta:
        return ChatDelta(content=text)

    def finish(self, finish_reason: str) -> tuple[ChatDelta, str]:
        return ChatDelta(), finish_reason


def plain_content(request: ChatCompletionRequest) -> MessageParser:
    """The parser of servers that have none for tool calls or reasoning."""
    return PlainContent()


def message_of(deltas: Sequence[ChatDelta], role: str) -> ChatMessage:
    """Return the message that the deltas of a stream add up to."""
    content = [delta.content for delta in deltas if isinstance(delta.content, str)]
    reasoning = [delta.reasoning for delta in deltas if isinstance(delta.reasoning, str)]
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        for part in delta.tool_calls or []:
            _add_call(calls, part)
    return ChatMessage(
        role=role,
        content="".join(content) if content or not calls else None,
        reasoning="".join(reasoning) if reasoning else UNSET,
        tool_calls=list(calls.values()) if calls else UNSET,
    )


def _add_call(calls: dict[int, ToolCall], part: ToolCall) -> None:
    index = part.index or 0
    whole = calls.get(index)
    if whole is None:
        calls[index] = ToolCall(function=msgspec.structs.replace(part.function), id=part.id, type=part.type)
    else:
        whole.function.name = whole.function.name or part.function.name
        whole.function.arguments = (whole.function.arguments or "") + (part.function.arguments or "")
