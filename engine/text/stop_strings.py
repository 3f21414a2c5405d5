"""Finds stop strings in a text that arrives in pieces, some of them hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self


class Found(NamedTuple):
    """Result for one piece of text."""

    text: str
    """visible text that cannot be part of a stop string any more"""
    stop_string: str | None
    """the stop string that ended the text"""


class StopStrings:
    """Searches for stop strings, and holds back text that may begin one.

    Special tokens may be hidden. A stop string that contains the text of one is matched against the text with the
    hidden parts, all others against the visible text only.

        text:  | returned | tail: may begin a stop string |    the tail's first `_num_out` characters are returned, too
    """

    def __init__(self, stop: Sequence[str], special_texts: Sequence[str], *, include: bool) -> None:
        """`include`: the stop string itself is part of the text, so its visible beginning need not be held back."""
        self._stop = tuple(stop)
        self._in_all = [any(text in stop_string for text in special_texts) for stop_string in stop]
        self._special = [text for text in special_texts if any(text in stop_string for stop_string in stop)]
        self._include = include
        self._tail = ""
        self._hidden: list[bool] = []
        self._num_out = 0

    def minds(self, special_text: str) -> bool:
        """Whether a hidden token with this text can be part of a stop string."""
        return special_text in self._special

    def copy(self) -> Self:
        """Return an independent copy of the state."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def feed(self, piece: str, *, hidden: bool = False, counts: bool = True) -> Found:
        """Add text; only a stop string that ends in it can match, and none if not `counts`."""
        if not piece:
            return Found("", None)
        text, marks = self._tail + piece, [*self._hidden, *[hidden] * len(piece)]
        match = self._first_match(text, marks) if counts else None
        if match is not None:
            start, end, rank = match
            out = _visible(text, marks, self._num_out, start)
            if self._include:
                start = max(start, self._num_out)
                out += text[start:end] if self._in_all[rank] else _visible(text, marks, start, end)
            self._tail, self._hidden, self._num_out = "", [], 0
            return Found(out, self._stop[rank])
        tail_start, first_held = self._longest_beginning(text, marks)
        out = _visible(text, marks, self._num_out, first_held)
        self._tail, self._hidden, self._num_out = text[tail_start:], marks[tail_start:], first_held - tail_start
        return Found(out, None)

    def flush(self) -> str:
        """End the text; return what was held back."""
        return _visible(self._tail, self._hidden, self._num_out, len(self._tail))

    def _first_match(self, text: str, marks: Sequence[bool]) -> tuple[int, int, int] | None:
        """Return (start, end, rank) of the match that starts first; on a tie, that of the first stop string."""
        places, shown = _shown(text, marks)
        num_old = len(self._tail)
        num_shown_old = num_old - sum(marks[:num_old])
        matches = []
        for rank, stop_string in enumerate(self._stop):
            size = len(stop_string)
            if self._in_all[rank]:
                start = text.find(stop_string, max(0, num_old - size + 1))
                if start >= 0:
                    matches.append((start, rank, start + size))
            else:
                start = shown.find(stop_string, max(0, num_shown_old - size + 1))
                if start >= 0:
                    matches.append((places[start], rank, places[start + size - 1] + 1))
        if not matches:
            return None
        start, rank, end = min(matches)
        return start, end, rank

    def _longest_beginning(self, text: str, marks: Sequence[bool]) -> tuple[int, int]:
        """Return the start of the longest suffix that is a prefix of a stop string, and from where to hold text."""
        places, shown = _shown(text, marks)
        plain = [stop_string for stop_string, in_all in zip(self._stop, self._in_all, strict=True) if not in_all]
        others = [stop_string for stop_string, in_all in zip(self._stop, self._in_all, strict=True) if in_all]
        num_plain, num_other = _size_of_beginning(shown, plain), _size_of_beginning(text, others)
        other_start = len(text) - num_other
        start = min(places[len(shown) - num_plain] if num_plain else len(text), other_start)
        if not self._include:
            return start, start
        # hidden text is returned only with a whole stop string, and the text after it no earlier
        held = next((index for index in range(other_start, len(text)) if marks[index]), len(text))
        return start, max(held, self._num_out)


def _shown(text: str, marks: Sequence[bool]) -> tuple[Sequence[int], str]:
    """Return the positions of the visible characters, and the characters."""
    if not any(marks):
        return range(len(text)), text
    places = [index for index, mark in enumerate(marks) if not mark]
    return places, "".join([text[index] for index in places])


def _visible(text: str, marks: Sequence[bool], start: int, end: int) -> str:
    if not any(marks[start:end]):
        return text[start:end]
    return "".join([text[index] for index in range(start, end) if not marks[index]])


def _size_of_beginning(text: str, stop: Sequence[str]) -> int:
    """Return the size of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = max((len(stop_string) for stop_string in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        suffix = text[-size:]
        if any(len(stop_string) > size and stop_string.startswith(suffix) for stop_string in stop):
            return size
    return 0
