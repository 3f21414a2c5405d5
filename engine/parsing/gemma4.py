"""The format of Gemma 4: thoughts in a channel of their own, tool calls in tags, and the answer around them.

    <|channel>thought\n…<channel|>I look.<|tool_call>call:NAME{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>

The tags are special tokens, so they must be in the text that is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

from sempre.engine.parsing.gemma4_arguments import ArgumentsReader
from sempre.engine.parsing.pieces import Arguments, Piece, Reasoning, TagSplitter, unfinished_part
from sempre.engine.parsing.tool_calls import AroundCalls

if TYPE_CHECKING:
    from sempre.engine.text.tokenizer import Tokenizer

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
# they end what is open, and say nothing else
ENDS = ("<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", "<|think|>")
TAGS = (CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, *ENDS)
_OF_CALLS = (CALL, CALL_END, QUOTE)
_THOUGHT = "thought\n"
_PREFIX = "call:"
_NAME = re.compile(r'[^\s{}<>"]+')
# after the arguments: white space and surplus closing brackets
_NOTHING = " \t\r\n}]"


def is_gemma4(tokenizer: Tokenizer) -> bool:
    """Whether the format's tags are special tokens."""
    return {CHANNEL, CHANNEL_END, CALL, CALL_END} <= set(tokenizer.special_texts.values())


def open_channel(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> str:
    """The channel that a prompt leaves open, from its tag on; "" without one."""
    return unfinished_part(tokenizer, prompt_token_ids, CHANNEL, TAGS)


class _At(Enum):
    CONTENT = auto()
    HEADER = auto()
    """the first line of a channel, which names it"""
    REASONING = auto()
    NAME = auto()
    """of a call"""
    ARGUMENTS = auto()
    AFTER_CALL = auto()


class Gemma4Parser(AroundCalls):
    """Thoughts are joined by line breaks. A call that names no function is content, unchanged."""

    def __init__(self, prompt: str = "", *, calls: bool) -> None:
        """`prompt`: its open channel (`open_channel`). Without `calls`, calls are content, unchanged."""
        super().__init__()
        self._splitter = TagSplitter(TAGS if calls else [tag for tag in TAGS if tag not in _OF_CALLS])
        self._at = _At.CONTENT
        # the text of this part so far, while it is undecided
        self._held = ""
        self._arguments = ArgumentsReader()
        self._begins_thought = False
        self._has_thoughts = False
        self.has_reasoning = False
        """Whether a channel has begun."""
        self.has_ended = False
        """Whether content or a call has."""
        self.feed(prompt)
        # what looks like the beginning of a tag there is text
        self._splitter.take_rest()
        self._has_thoughts = False

    def feed(self, text: str) -> list[Piece]:
        for before, tag in self._splitter.split(text):
            self._add(before)
            if tag:
                self._at_tag(tag)
        return self._take()

    def finish(self) -> list[Piece]:
        self._add(self._splitter.take_rest())
        match self._at:
            case _At.HEADER:
                self._end_header()
            case _At.NAME:
                self._give_back()
            case _At.ARGUMENTS:
                self._arguments.cut_off()
                self._take_arguments()
        return self._finish()

    def _at_tag(self, tag: str) -> None:
        if tag == QUOTE:
            self._add_quote()
            return
        if self._at is _At.ARGUMENTS and self._arguments.is_in_text and tag != CALL_END:
            self._add(tag)
            return
        self._end(is_call_end=tag == CALL_END)
        if tag == CHANNEL:
            self._at, self._begins_thought, self.has_reasoning = _At.HEADER, self._has_thoughts, True
        elif tag == CALL:
            self._at = _At.NAME

    def _add_quote(self) -> None:
        if self._at is _At.ARGUMENTS:
            self._arguments.quote()
            self._take_arguments()
        else:
            self._add(QUOTE)

    def _end(self, *, is_call_end: bool) -> None:
        """Whatever was read last has ended."""
        match self._at:
            case _At.HEADER:
                self._end_header()
            case _At.NAME:
                name = self._name()
                if name is None or not is_call_end:
                    self._give_back(CALL_END if is_call_end else "")
                else:
                    self._start_call(name)
                    self._pieces.append(Arguments(self._num_calls - 1, "{}"))
            case _At.ARGUMENTS:
                self._arguments.end()
                self._take_arguments()
        self._at, self._held = _At.CONTENT, ""

    def _add(self, text: str) -> None:
        if not text:
            return
        match self._at:
            case _At.CONTENT:
                self._say(text)
            case _At.HEADER:
                self._held += text
                if not _THOUGHT.startswith(self._held):
                    self._end_header()
            case _At.REASONING:
                self._think(text)
            case _At.NAME:
                self._add_to_name(text)
            case _At.ARGUMENTS:
                self._add_to_arguments(text)
            case _At.AFTER_CALL:
                self._held += text
                if self._held.strip(_NOTHING):
                    self._at = _At.CONTENT
                    self._say(self._held)

    def _end_header(self) -> None:
        is_cut = self._held == _THOUGHT.strip()
        rest = "" if is_cut else self._held.removeprefix(_THOUGHT)
        self._at, self._held = _At.REASONING, ""
        self._think(rest)

    def _think(self, text: str) -> None:
        if text:
            self._pieces.append(Reasoning("\n" + text if self._begins_thought else text))
            self._begins_thought, self._has_thoughts = False, True

    def _add_to_name(self, text: str) -> None:
        before, bracket, after = text.partition("{")
        self._held += before
        if not bracket:
            return
        name = self._name()
        if name is None:
            self._held += bracket + after
            self._give_back()
            return
        self._start_call(name)
        self._at, self._held, self._arguments = _At.ARGUMENTS, "", ArgumentsReader()
        self._add_to_arguments(bracket + after)

    def _name(self) -> str | None:
        held = self._held.strip()
        name = held.removeprefix(_PREFIX).strip()
        return name if held.startswith(_PREFIX) and _NAME.fullmatch(name) else None

    def _add_to_arguments(self, text: str) -> None:
        rest = self._arguments.feed(text)
        self._take_arguments()
        if self._arguments.done:
            self._at, self._held = _At.AFTER_CALL, ""
            self._add(rest)

    def _take_arguments(self) -> None:
        if news := self._arguments.take():
            self._pieces.append(Arguments(self._num_calls - 1, news))

    def _give_back(self, end: str = "") -> None:
        text, self._held = CALL + self._held + end, ""
        self._at = _At.CONTENT
        self._say(text)

    def _say(self, text: str) -> None:
        super()._say(text)
        self.has_ended |= not self._content_is_blank

    def _start_call(self, name: str) -> None:
        super()._start_call(name)
        self.has_ended = True
