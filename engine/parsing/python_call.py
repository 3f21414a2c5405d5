"""Reads the arguments of one call, as Python writes them, while they arrive.

    weather(city="Rome", days=[1, 2])  →  {"city": "Rome", "days": [1, 2]}

Each character is read once, so the time is linear in the length of the text, however it is cut.
"""

from __future__ import annotations

import json
import re
import unicodedata
from enum import Enum, auto
from typing import Any

from sempre.engine.parsing.pieces import well_formed

_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
# the same as Python's limits for nested brackets, and for the digits of an integer
_MOST_LEVELS = 200
_LONGEST_TOKEN = 4300
_SPACE = re.compile(r"[ \t\r\n\f]*")
_TOKEN = re.compile(
    r"(?P<string>[A-Za-z]{0,2}(?:'''|\"\"\"|'|\"))|(?P<word>[^\W\d]\w*)|(?P<mark>[()\[\]{},:=+-])"
    r"|(?P<number>[0-9.](?:[eE][+-]?[0-9]|[0-9A-Za-z_.])*)"
)
_INTEGER = re.compile(r"0|[1-9][0-9]*")
_ESCAPE = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})"
    r"|N\{(?P<name>[^{}]*)\}|(?P<other>.))",
    re.DOTALL,
)
_ESCAPED = dict(zip("\n\\'\"abfnrtv", ("", "\\", "'", '"', "\a", "\b", "\f", "\n", "\r", "\t", "\v"), strict=True))
# up to the quotation mark that ends a string, a line break in it, or what the next text decides
# a part of a body: all of it would take memory for each turn, and possessive groups are wrong before Python 3.11.5
_BODIES = {
    "'": re.compile(r"(?:[^\\'\r\n]+|\\.){1,512}", re.DOTALL),
    '"': re.compile(r'(?:[^\\"\r\n]+|\\.){1,512}', re.DOTALL),
    "'''": re.compile(r"(?:[^\\']+|\\.|'{1,2}(?=[^'])){1,512}", re.DOTALL),
    '"""': re.compile(r'(?:[^\\"]+|\\.|"{1,2}(?=[^"])){1,512}', re.DOTALL),
}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class _At(Enum):
    NAME = auto()
    """of a keyword argument, or the end of the call"""
    EQUALS = auto()
    KEY = auto()
    """of a dict, or its end"""
    COLON = auto()
    ITEM = auto()
    """of a list or tuple, or its end"""
    VALUE = auto()
    SIGNED = auto()
    """the number after a sign"""
    AFTER = auto()
    """a value"""


_FIRST = {"": _At.NAME, "(": _At.ITEM, "[": _At.ITEM, "{": _At.KEY}


class _Malformed(Exception):
    """Not a call that JSON can hold."""


class PythonCallReader:
    """Feed it the text after the bracket that begins the arguments until `done` or `malformed`.

    Python's and JSON's words for true, false and null may both occur. A name that occurs twice has its last value.
    Positional arguments, unpacking, sets, bytes, f-strings, expressions and comments are malformed.
    """

    def __init__(self) -> None:
        self.done = False
        self.malformed = False
        self._at = _At.NAME
        # the beginning of a token that the next text may continue
        self._pending = ""
        self._call: dict[str, Any] = {}
        # what is open, innermost last: its bracket, its value, and the key of the value that comes
        self._open: list[tuple[str, Any]] = [("", self._call)]
        self._keys = [""]
        # the last value; adjacent strings are one
        self._value: Any = None
        self._strings: list[str] = []
        self._sign = ""
        # the string that is being read
        self._quote = ""
        self._is_raw = False
        self._body: list[str] = []

    @property
    def arguments(self) -> str | None:
        """The arguments as JSON; None if it cannot hold them."""
        try:
            return well_formed(json.dumps(self._call, ensure_ascii=False, allow_nan=False))
        except ValueError:
            return None

    def feed(self, text: str, start: int = 0) -> int:
        """Read `text` from `start` to the end of the call, or to the first error; return where it ends in `text`."""
        position, before = start, 0
        if self._pending:
            text, position, before = self._pending + text[start:], 0, start - len(self._pending)
            self._pending = ""
        try:
            while position < len(text) and not self.done:
                found = self._read_string(text, position) if self._quote else self._read_token(text, position)
                position = len(text) if found is None else found
        except _Malformed:
            self.malformed = True
        return before + position

    def _wait(self, text: str) -> None:
        if len(text) > _LONGEST_TOKEN:
            raise _Malformed
        self._pending = text

    def _read_token(self, text: str, position: int) -> int | None:
        """The end of the next token, which has been used; None if it needs more text."""
        space = _SPACE.match(text, position)
        position = position if space is None else space.end()
        if position == len(text):
            return position
        found = _TOKEN.match(text, position)
        if found is None:
            raise _Malformed
        kind, token, end = found.lastgroup, found[0], found.end()
        next_character = text[end : end + 1]
        if kind == "string" and token[-3:-2] != token[-1]:
            is_undecided = not next_character or (next_character == token[-1] and end + 1 == len(text))
        elif kind == "number":
            is_undecided = not next_character or (token[-1] in "eE" and text[end:] in ("+", "-"))
        else:
            is_undecided = kind == "word" and not next_character
        if is_undecided:
            self._wait(text[position:])
            return None
        if kind == "mark":
            self._mark(token)
        elif kind == "string":
            self._begin_string(token)
        elif kind == "word":
            self._word(token)
        else:
            self._number(token)
        return end

    def _mark(self, mark: str) -> None:
        match self._at, mark:
            case _At.EQUALS, "=":
                self._at = _At.VALUE
            case _At.COLON, ":":
                self._keys[-1] = self._take_string()
                self._at = _At.VALUE
            case ((_At.VALUE | _At.ITEM), "(" | "[" | "{"):
                self._open.append((mark, {} if mark == "{" else []))
                self._keys.append("")
                self._at = _FIRST[mark]
                if len(self._open) > _MOST_LEVELS:
                    raise _Malformed
            case ((_At.VALUE | _At.ITEM), "+" | "-"):
                self._sign, self._at = mark, _At.SIGNED
            case _At.AFTER, ",":
                self._keep_value()
                self._at = _FIRST[self._open[-1][0]]
            case ((_At.AFTER | _At.NAME | _At.KEY | _At.ITEM), ")" | "]" | "}"):
                self._close(mark)
            case _:
                raise _Malformed

    def _word(self, word: str) -> None:
        if self._at is _At.NAME:
            self._keys[-1], self._at = word, _At.EQUALS
        elif self._at in (_At.VALUE, _At.ITEM) and word in _WORDS:
            self._value, self._at = _WORDS[word], _At.AFTER
        else:
            raise _Malformed

    def _number(self, text: str) -> None:
        if self._at not in (_At.VALUE, _At.ITEM, _At.SIGNED) or len(text) > _LONGEST_TOKEN:
            raise _Malformed
        try:
            value = int(text) if _INTEGER.fullmatch(text) else _number(text)
        except ValueError:
            raise _Malformed from None
        self._value, self._sign, self._at = -value if self._sign == "-" else value, "", _At.AFTER

    def _begin_string(self, token: str) -> None:
        continues = self._strings and self._at in (_At.AFTER, _At.COLON)
        if not continues and self._at not in (_At.VALUE, _At.ITEM, _At.KEY):
            raise _Malformed
        prefix = token.rstrip("'\"").lower()
        if prefix not in ("", "r", "u"):
            raise _Malformed
        self._quote, self._is_raw, self._body = token[len(prefix) :], prefix == "r", []
        if not continues:
            self._at = _At.COLON if self._at is _At.KEY else _At.AFTER

    def _read_string(self, text: str, position: int) -> int | None:
        """The end of what has been read of a string; None if more must come first."""
        end = position
        while body := _BODIES[self._quote].match(text, end):
            end = body.end()
        self._body.append(text[position:end])
        rest = text[end : end + len(self._quote)]
        if rest == self._quote:
            whole = "".join(self._body)
            self._strings.append(whole if self._is_raw else _ESCAPE.sub(_unescaped, whole))
            self._quote = ""
            return end + len(rest)
        if rest and rest != "\\" and not self._quote.startswith(rest):
            raise _Malformed  # a line break
        self._wait(rest)
        return None

    def _take_string(self) -> str:
        text = "".join(self._strings)
        self._strings.clear()
        return text

    def _keep_value(self) -> None:
        value = self._take_string() if self._strings else self._value
        _, container = self._open[-1]
        if isinstance(container, dict):
            container[self._keys[-1]] = value
        else:
            container.append(value)

    def _close(self, mark: str) -> None:
        is_after_value = self._at is _At.AFTER
        if is_after_value:
            self._keep_value()
        bracket, container = self._open.pop()
        self._keys.pop()
        if _CLOSING.get(bracket, ")") != mark:
            raise _Malformed
        # brackets around one value make no tuple
        self._value = container[0] if bracket == "(" and len(container) == 1 and is_after_value else container
        self._at = _At.AFTER
        self.done = not self._open


def _number(text: str) -> int | float:
    """Any other number that Python writes. Raises ValueError for one that it does not, or that JSON lacks."""
    is_decimal = text[:1] != "0" or text[1:2].lower() not in ("x", "o", "b")
    return float(text) if is_decimal and set(text) & set(".eE") else int(text, 0)


def _unescaped(found: re.Match[str]) -> str:
    kind, text = found.lastgroup, found[found.lastgroup or 0]
    match kind:
        case "octal":
            return chr(int(text, 8))
        case "x" | "u" | "U":
            if int(text, 16) > 0x10FFFF:
                raise _Malformed
            return chr(int(text, 16))
        case "name":
            try:
                return unicodedata.lookup(text)
            except KeyError:
                raise _Malformed from None
        case _ if text in "xuUN":
            raise _Malformed
        case _:
            return _ESCAPED.get(text, found[0])
