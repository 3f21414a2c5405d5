"""Reasoning before the answer, between tags or phrases that the model has for it, or in the channel of Gemma 4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sempre.engine.parsing import gemma4, harmony
from sempre.engine.parsing.pieces import Content, Piece, Reasoning, split_before_tag

if TYPE_CHECKING:
    from sempre.engine.text.token_stream import TokenStream
    from sempre.engine.text.tokenizer import Tokenizer

START, END = "<think>", "</think>"


class ReasoningTags(NamedTuple):
    """What begins and what ends reasoning."""

    start: str
    end: str


THINK = ReasoningTags(START, END)
_CHANNEL = ReasoningTags(gemma4.CHANNEL, gemma4.CHANNEL_END)
MISTRAL = ReasoningTags("[THINK]", "[/THINK]")
SEED = ReasoningTags("<seed:think>", "</seed:think>")
GRANITE = (
    ReasoningTags("Here is my thought process:", "Here is my response:"),
    ReasoningTags("Here's my thought process:", "Here's my response:"),
)
"""Phrases, either of which may begin and end reasoning."""

_TAIL_TOKENS = 16
"""Number of last tokens to search for a final tag in a prompt without turns."""


def tags_of(tokenizer: Tokenizer) -> ReasoningTags:
    """Those that the model writes."""
    if gemma4.is_gemma4(tokenizer):
        return _CHANNEL
    return next((tags for tags in (MISTRAL, SEED) if set(tags) <= tokenizer.added_texts), THINK)


def opens_reasoning(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool | None:
    """Whether a prompt ends inside reasoning; None if reasoning has ended in it, so the output has none.

    Chat templates end a prompt with the start tag to make the model think, or with empty reasoning to prevent it;
    the last turn may also be the beginning of an answer to continue.
    """
    tags = tags_of(tokenizer)
    turn = _last_turn(tokenizer, prompt_token_ids, tags)
    start, end = turn.rfind(tags.start), turn.rfind(tags.end)
    return start >= 0 if start >= end else None


class PromptReasoning:
    """Whether a prompt opens reasoning, computed on first use."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids

    @cached_property
    def opened(self) -> bool | None:
        """See `opens_reasoning`."""
        return opens_reasoning(self._tokenizer, self._prompt_token_ids)

    @cached_property
    def open_message(self) -> str:
        """See `harmony.open_message`."""
        return harmony.open_message(self._tokenizer, self._prompt_token_ids)

    @cached_property
    def open_channel(self) -> str:
        """See `gemma4.open_channel`."""
        return gemma4.open_channel(self._tokenizer, self._prompt_token_ids)


def _last_turn(tokenizer: Tokenizer, token_ids: Sequence[int], tags: ReasoningTags) -> str:
    """The text after the last special token, where a turn begins; without one, the tag that ends the prompt."""
    special_texts = tokenizer.special_texts
    for place in range(len(token_ids) - 1, -1, -1):
        if special_texts.get(token_ids[place], tags.start) not in tags:
            return tokenizer.decode(token_ids[place + 1 :], skip_special_tokens=False)
    tail = tokenizer.decode(token_ids[-_TAIL_TOKENS:], skip_special_tokens=False).rstrip()
    return next((tag for tag in tags if tail.endswith(tag)), "")


class ReasoningSplitter:
    """Reasoning up to the first tag that ends it, then content; only the tags are removed.

    A text that begins inside reasoning and never ends it is all reasoning. Otherwise reasoning must begin with a start
    tag, optionally after white space; a text that does not is all content.
    """

    def __init__(self, *, inside: bool, tags: Sequence[ReasoningTags] = (THINK,)) -> None:
        """`tags`: any of them begins and ends reasoning."""
        self._starts, self._ends = [each.start for each in tags], [each.end for each in tags]
        self._inside = inside
        self._started = False
        self._ended = False
        self.has_reasoning = inside
        """Whether the text begins with reasoning, as far as that is known."""
        self._undecided = ""

    @property
    def has_ended(self) -> bool:
        """Whether what follows is content."""
        return self._ended

    def feed(self, text: str) -> list[Piece]:
        self._undecided += text
        pieces: list[Piece] = []
        if not self._started and not self._decide_start(final=False):
            return pieces
        if not self._ended:
            before = self._before_end()
            if before:
                pieces.append(Reasoning(before))
        if self._ended and self._undecided:
            pieces.append(Content(self._undecided))
            self._undecided = ""
        return pieces

    def finish(self) -> list[Piece]:
        if not self._started:
            self._decide_start(final=True)
        rest, self._undecided = self._undecided, ""
        if not rest:
            return []
        return [Content(rest)] if self._ended else [Reasoning(rest)]

    def _before_end(self) -> str:
        """Take the reasoning that is certain, and the tag that ends it."""
        text = self._undecided
        places = [(place, end) for end in self._ends if (place := text.find(end)) >= 0]
        if places:
            place, end = min(places)
            self._ended, self._undecided = True, text[place + len(end) :]
            return text[:place]
        certain = min((split_before_tag(text, end)[0] for end in self._ends), key=len)
        self._undecided = text[len(certain) :]
        return certain

    def _decide_start(self, *, final: bool) -> bool:
        """Return whether the beginning of the text is decided."""
        begin = self._undecided.lstrip()
        start = next((start for start in self._starts if begin.startswith(start)), None)
        if start is not None:
            self._undecided = begin[len(start) :]
            self.has_reasoning = True
        elif not final and any(start.startswith(begin) for start in self._starts):
            return False
        else:
            self._ended = not self._inside
        self._started = True
        return True


class _Counted(Protocol):
    @property
    def has_reasoning(self) -> bool: ...

    @property
    def has_ended(self) -> bool: ...

    def feed(self, text: str) -> list[Piece]: ...


class ReasoningCounter:
    """Counts the tokens of an output until its reasoning has ended, tags included, however the output is cut."""

    def __init__(self, splitter: _Counted, stream: TokenStream) -> None:
        """`stream` decodes the output."""
        self._splitter = splitter
        self._stream = stream
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Add tokens of the output."""
        for token_id in token_ids:
            if self._splitter.has_ended:
                return
            self._splitter.feed(self._stream.push(token_id))
            self._num_tokens += 1

    @property
    def count(self) -> int:
        """Number of tokens so far."""
        return self._num_tokens if self._splitter.has_reasoning else 0
