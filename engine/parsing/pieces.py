"""What a parser yields, the message assembled from it, and text that may begin a tag."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sempre.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Tool call `index` begins; its name is complete."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of tool call `index`: JSON text, exactly as generated."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | Arguments


class Parser(Protocol):
    """Takes a text in chunks."""

    def feed(self, text: str) -> list[Piece]:
        """Return the pieces that are certain after `text`."""

    def finish(self) -> list[Piece]:
        """End the text; return the remaining pieces."""


@dataclass(slots=True)
class ToolCall:
    """One complete tool call."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedMessage:
    """All pieces joined; None means there were none of that kind."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def assemble(pieces: Iterable[Piece]) -> ParsedMessage:
    """Assemble pieces into a message."""
    message = ParsedMessage()
    for piece in pieces:
        match piece:
            case Content(text):
                message.content = (message.content or "") + text
            case Reasoning(text):
                message.reasoning = (message.reasoning or "") + text
            case CallStart(_, name):
                message.tool_calls.append(ToolCall(name))
            case Arguments(index, text):
                message.tool_calls[index].arguments += text
    return message


def unfinished_part(tokenizer: Tokenizer, token_ids: Sequence[int], start: str, tags: Sequence[str]) -> str:
    """The text from the last special token `start` on; "" where another of the `tags` follows it, or without one."""
    special_texts = tokenizer.special_texts
    for place in range(len(token_ids) - 1, -1, -1):
        text = special_texts.get(token_ids[place])
        if text == start:
            return tokenizer.decode(token_ids[place:], skip_special_tokens=False)
        if text in tags:
            break
    return ""


def well_formed(text: str) -> str:
    """Text that UTF-8 can hold, from one with escapes: surrogates of a pair become its character, others U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_before_tag(text: str, tag: str) -> tuple[str, str]:
    """(certain, undecided): `text`, which does not contain `tag`, cut where a tag may begin."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return text[:-size], text[-size:]
    return text, ""


class TagSplitter:
    """Cuts a text that arrives in parts at its tags. What may be the beginning of a tag waits for what follows."""

    def __init__(self, tags: Sequence[str]) -> None:
        self._tags = tags
        self._tag = re.compile("|".join(map(re.escape, tags)))
        self._undecided = ""

    def split(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield the text before each tag, with the tag; at last what is certain of the rest, with ""."""
        text = self._undecided + text
        done = 0
        for tag in self._tag.finditer(text):
            yield text[done : tag.start()], tag[0]
            done = tag.end()
        certain = min((split_before_tag(text[done:], tag)[0] for tag in self._tags), key=len)
        self._undecided = text[done + len(certain) :]
        yield certain, ""

    def take_rest(self) -> str:
        """What is undecided: text, since nothing follows."""
        rest, self._undecided = self._undecided, ""
        return rest
