"""Reasoning before the answer, between <think> and </think>."""

from __future__ import annotations

from sempre.engine.parsing.pieces import Content, Piece, Reasoning
from sempre.engine.parsing.tags import split_before_tag

START, END = "<think>", "</think>"


def opens_reasoning(prompt: str) -> bool | None:
    """Whether `prompt` ends with the start tag; None where it ends with the end tag: there will be no reasoning.

    Chat templates end a prompt so to have the model think, or with empty reasoning to keep it from that.
    """
    end = prompt.rstrip()
    return None if end.endswith(END) else end.endswith(START)


class ReasoningSplitter:
    """Reasoning up to the first </think>, then content; no character but the tags is lost.

    Beginning inside, a text without </think> is all reasoning. Otherwise reasoning must begin with <think>, at most
    behind white space; a text that does not is all content.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._started = False
        self._ended = False
        self._undecided = ""

    def feed(self, text: str) -> list[Piece]:
        self._undecided += text
        pieces: list[Piece] = []
        if not self._started and not self._decide_start(final=False):
            return pieces
        if not self._ended:
            before, tag, after = self._undecided.partition(END)
            if tag:
                self._ended = True
                self._undecided = after
            else:
                before, self._undecided = split_before_tag(before, END)
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

    def _decide_start(self, *, final: bool) -> bool:
        """Whether it is clear now how the text begins."""
        begin = self._undecided.lstrip()
        if begin.startswith(START):
            self._undecided = begin[len(START) :]
        elif START.startswith(begin) and not final:
            return False
        else:
            self._ended = not self._inside
        self._started = True
        return True
