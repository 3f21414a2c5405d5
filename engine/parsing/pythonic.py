"""Tool calls as a list of calls in Python: Llama 4 and others.

    [weather(city="Rome", days=2), clock()]

A call is passed on once it is complete: until then its arguments are no JSON.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from enum import Enum, auto
from typing import Any

from sempre.engine.parsing.pieces import Arguments, Piece, well_formed
from sempre.engine.parsing.tool_calls import AroundCalls

_START, _END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"\s*[A-Za-z_][\w.]*\s*")
_WORDS = {"true": True, "false": False, "null": None}
_OPENING, _CLOSING = "([{", ")]}"


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
        # the text since the last call that is complete
        self._held = ""
        # where the call begins in it, and how far its characters are read
        self._start = self._read = 0
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def feed(self, text: str) -> list[Piece]:
        if self._at is _At.CONTENT:
            self._say(text)
            return self._take()
        self._held += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        rest, self._held = self._held, ""
        self._say(rest)
        return self._finish()

    def _step(self) -> bool:
        """Read some of the text; False if more is needed."""
        match self._at:
            case _At.BEGIN:
                return self._begin()
            case _At.NAME:
                return self._name()
            case _At.CALL:
                return self._call()
            case _At.BETWEEN:
                return self._between()
            case _At.AFTER:
                return self._after()
            case _At.CONTENT:
                return False

    def _begin(self) -> bool:
        begun = self._held.lstrip()
        if begun.startswith(_START):
            begun = begun[len(_START) :].lstrip()
        elif _START.startswith(begun):
            return False
        if not begun:
            return False
        if not begun.startswith("["):
            return self._give_up()
        self._start = len(self._held) - len(begun) + 1
        self._at = _At.NAME
        return True

    def _name(self) -> bool:
        rest = self._held[self._start :]
        found = _NAME.match(rest)
        end = 0 if found is None else found.end()
        if end == len(rest) or not rest.strip():
            return False
        if found is None or rest[end] != "(":
            return self._give_up()
        self._at, self._read, self._depth = _At.CALL, self._start + end, 0
        return True

    def _call(self) -> bool:
        """Read to the parenthesis that ends the call."""
        while self._read < len(self._held):
            character = self._held[self._read]
            self._read += 1
            if self._quote:
                self._in_string(character)
            elif character in "\"'":
                self._quote = character
            elif character in _OPENING:
                self._depth += 1
            elif character in _CLOSING:
                self._depth -= 1
                if not self._depth:
                    return self._end_call()
        return False

    def _in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == self._quote:
            self._quote = ""

    def _end_call(self) -> bool:
        found = _parsed(self._held[self._start : self._read].strip())
        if found is None:
            return self._give_up()
        name, arguments = found
        self._start_call(name)
        self._pieces.append(Arguments(self._num_calls - 1, arguments))
        self._held, self._at = self._held[self._read :], _At.BETWEEN
        return True

    def _between(self) -> bool:
        begun = self._held.lstrip()
        if not begun:
            return False
        self._held = begun[1:]
        if begun[0] == ",":
            self._held, self._start, self._at = begun, 1, _At.NAME
            return True
        if begun[0] != "]":
            self._held = begun
            return self._give_up()
        self._at = _At.AFTER
        return True

    def _after(self) -> bool:
        """After the list, where a tag may end it."""
        begun = self._held.lstrip()
        if begun.startswith(_END):
            self._held = begun[len(_END) :]
        elif _END.startswith(begun):
            return False
        return self._give_up()

    def _give_up(self) -> bool:
        """The rest is content."""
        rest, self._held, self._at = self._held, "", _At.CONTENT
        self._say(rest)
        return False


def _parsed(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of a call; None if it is none that JSON can hold."""
    try:
        with warnings.catch_warnings():
            # of strings with unknown escapes, which are kept as they are
            warnings.simplefilter("ignore")
            call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
        if None in arguments:
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        return ast.unparse(call.func), well_formed(written)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """A literal, in which Python's and JSON's words for true, false and null may occur."""
    match node:
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys):
                raise ValueError
            return {ast.literal_eval(key): _value(value) for key, value in zip(keys, values, strict=True) if key}
        case _:
            value = ast.literal_eval(node)
            if not isinstance(value, str | int | float | None):
                raise ValueError
            return value
