"""Tool calls as a list of calls in Python: Llama 4 and others.

    [weather(city="Rome", days=2), clock()]

A call is passed on once it is complete: until then its arguments are no JSON.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from keyword import iskeyword

from sempre.engine.parsing.pieces import Arguments, Piece
from sempre.engine.parsing.python_call import PythonCallReader
from sempre.engine.parsing.tool_calls import AroundCalls

_START, _END = "<|python_start|>", "<|python_end|>"
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"([A-Za-z_][\w.]*)\s*")
# longer ones are none
_LONGEST_NAME = 512


class _At(Enum):
    BEGIN = auto()
    NAME = auto()
    """of a call, from the bracket or comma before it on"""
    CALL = auto()
    """inside the parentheses"""
    BETWEEN = auto()
    """after a call"""
    AFTER = auto()
    """after the list"""
    CONTENT = auto()


class PythonicParser(AroundCalls):
    """A list that is none of calls with literal keyword arguments is content, unchanged, from its first other part on.

    Text after the list is content.
    """

    def __init__(self) -> None:
        super().__init__()
        self._at = _At.BEGIN
        # text that is content unless a call comes of it
        self._read: list[str] = []
        # what has not been read, from the position on
        self._text = ""
        self._position = 0
        self._has_tag = False
        self._name_of_call = ""
        self._call = PythonCallReader()

    def feed(self, text: str) -> list[Piece]:
        if self._at is _At.CONTENT:
            self._say(text)
            return self._take()
        self._text, self._position = self._text[self._position :] + text, 0
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        self._give_up()
        return self._finish()

    def _step(self) -> bool:
        """Read some of the text; False if more is needed."""
        if self._at not in (_At.CALL, _At.CONTENT):
            self._skip_space()
            if self._position == len(self._text):
                return False
        match self._at:
            case _At.BEGIN:
                return self._begin()
            case _At.NAME:
                return self._name()
            case _At.CALL:
                return self._arguments()
            case _At.BETWEEN:
                return self._between()
            case _At.AFTER:
                return self._after()
            case _At.CONTENT:
                return False

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self._position)
        self._use(self._position if space is None else space.end())

    def _use(self, end: int) -> None:
        self._read.append(self._text[self._position : end])
        self._position = end

    def _begin(self) -> bool:
        text, position = self._text, self._position
        if text.startswith("[", position):
            self._use(position + 1)
            self._at = _At.NAME
            return True
        if not self._has_tag and text.startswith(_START, position):
            self._use(position + len(_START))
            self._has_tag = True
            return True
        if not self._has_tag and _START.startswith(text[position : position + len(_START)]):
            return False
        return self._give_up()

    def _name(self) -> bool:
        text, found = self._text, _NAME.match(self._text, self._position)
        if found is None or found.end() - self._position > _LONGEST_NAME:
            return self._give_up()
        if found.end() == len(text):
            return False
        name = found[1]
        if text[found.end()] != "(" or not all(map(_is_name, name.split("."))):
            return self._give_up()
        self._use(found.end() + 1)
        self._at, self._call, self._name_of_call = _At.CALL, PythonCallReader(), name
        return True

    def _arguments(self) -> bool:
        """Read to the parenthesis that ends the call."""
        call = self._call
        self._use(call.feed(self._text, self._position))
        if not (call.done or call.malformed):
            return False
        arguments = call.arguments if call.done else None
        if arguments is None:
            return self._give_up()
        self._start_call(self._name_of_call)
        self._pieces.append(Arguments(self._num_calls - 1, arguments))
        self._read.clear()
        self._at = _At.BETWEEN
        return True

    def _between(self) -> bool:
        mark = self._text[self._position]
        self._read.clear()
        if mark == ",":
            self._use(self._position + 1)
            self._at = _At.NAME
            return True
        if mark != "]":
            return self._give_up()
        self._position += 1
        self._at = _At.AFTER
        return True

    def _after(self) -> bool:
        """After the list, where a tag may end it."""
        text, position = self._text, self._position
        if text.startswith(_END, position):
            self._read.clear()
            self._position += len(_END)
        elif _END.startswith(text[position:]):
            return False
        return self._give_up()

    def _give_up(self) -> bool:
        """The rest is content."""
        self._say("".join(self._read) + self._text[self._position :])
        self._read.clear()
        self._text, self._position, self._at = "", 0, _At.CONTENT
        return False


def _is_name(part: str) -> bool:
    return part.isidentifier() and not iskeyword(part)
