"""The harmony format of gpt-oss: an output is a sequence of messages, each with a header that says what it is.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

Messages on the channel `analysis` are reasoning, those to `functions.NAME` calls, those to another recipient reasoning
too, and all others content. The format's tags are special tokens, so they must be in the text that is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

from sempre.engine.parsing.pieces import (
    Arguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
    TagSplitter,
    unfinished_part,
)

if TYPE_CHECKING:
    from sempre.engine.text.tokenizer import Tokenizer

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
TAGS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
ENDS = (END, CALL, RETURN)

_TAG = re.compile("|".join(map(re.escape, TAGS)))
_ROLE = re.compile(r"^\s*(?:assistant|user|system|developer|tool)(?![a-z])")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"(?:^|\s|\|>)to=((?:(?!<\|)\S)+)")
_FUNCTIONS = "functions."
# recipients that are no tools
_READERS = ("user", "all")


def is_harmony(tokenizer: Tokenizer) -> bool:
    """Whether the format's tags are special tokens."""
    return {START, CHANNEL, MESSAGE, END} <= set(tokenizer.special_texts.values())


def open_message(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> str:
    """The message that a prompt leaves unfinished, from its <|start|> on; "" without one."""
    return unfinished_part(tokenizer, prompt_token_ids, START, ENDS)


class _Kind(Enum):
    CONTENT = auto()
    REASONING = auto()
    CALL = auto()


class HarmonyParser:
    """Messages of one kind are joined by line breaks.

    Text without a header is content, if it is not blank. A message also ends where another begins; other tags inside it
    are left out. A header that never ends is dropped.
    """

    def __init__(self, prompt: str = "", *, calls: bool) -> None:
        """`prompt`: its unfinished message (`open_message`). Without `calls`, messages to functions are content."""
        self._calls = False
        self._pieces: list[Piece] = []
        self._splitter = TagSplitter(TAGS)
        # the text and tags since the last message, after the part of the header in the prompt; None inside a message
        self._header: list[str] | None = []
        self._prompt_header = ""
        self._kind = _Kind.CONTENT
        self._num_calls = 0
        # kinds of messages with text, and whether this message has none yet
        self._said: set[_Kind] = set()
        self._is_blank = True
        self.has_reasoning = False
        """Whether a message of reasoning has begun."""
        self.has_ended = False
        """Whether one of another kind has."""
        self.feed(prompt)
        self._splitter.take_rest()
        self._calls = calls
        self._said.clear()
        self.has_ended = self._header is None and self._kind is not _Kind.REASONING
        if self._header is not None:
            self._prompt_header, self._header = "".join(self._header), []

    def feed(self, text: str) -> list[Piece]:
        for before, tag in self._splitter.split(text):
            self._add(before)
            if tag:
                self._at_tag(tag)
        return self._take()

    def finish(self) -> list[Piece]:
        self._add(self._splitter.take_rest())
        self._end()
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _at_tag(self, tag: str) -> None:
        header = self._header
        if tag == MESSAGE and header is not None:
            self._begin_message(self._prompt_header + "".join(header))
        elif tag in (CHANNEL, CONSTRAIN) and header is not None:
            header.append(tag)
        elif tag in (START, CHANNEL, *ENDS):
            self._end()
            self._header = [] if tag in ENDS else [tag]

    def _begin_message(self, header: str) -> None:
        self._header, self._prompt_header, self._is_blank = None, "", True
        to, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        recipient = to[1] if to is not None and to[1] not in _READERS else ""
        if recipient.startswith(_FUNCTIONS) and recipient != _FUNCTIONS:
            self._kind = _Kind.CALL if self._calls else _Kind.CONTENT
        elif recipient or (channel is not None and channel[1] == "analysis"):
            self._kind = _Kind.REASONING
        else:
            self._kind = _Kind.CONTENT
        self._note_kind()
        if self._kind is _Kind.CALL:
            self._pieces.append(CallStart(self._num_calls, recipient.removeprefix(_FUNCTIONS)))
            self._num_calls += 1

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._header is not None:
            self._header.append(text)
        elif self._kind is _Kind.CALL:
            self._is_blank = self._is_blank and not text.strip()
            self._pieces.append(Arguments(self._num_calls - 1, text))
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._is_blank and self._kind in self._said:
            text = "\n" + text
        self._is_blank = False
        self._said.add(self._kind)
        self._pieces.append(Content(text) if self._kind is _Kind.CONTENT else Reasoning(text))

    def _end(self) -> None:
        """Whatever was read last has ended."""
        if self._header is None:
            if self._kind is _Kind.CALL and self._is_blank:
                self._pieces.append(Arguments(self._num_calls - 1, "{}"))
            return
        text, self._prompt_header = "".join(self._header), ""
        if text.startswith(START):
            text = _ROLE.sub("", text.removeprefix(START), count=1)
        if text.strip() and not _TAG.search(text) and not _RECIPIENT.match(text):
            self._kind, self._is_blank = _Kind.CONTENT, True
            self._note_kind()
            self._say(text)

    def _note_kind(self) -> None:
        self.has_reasoning |= self._kind is _Kind.REASONING
        self.has_ended |= self._kind is not _Kind.REASONING
