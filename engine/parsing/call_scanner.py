"""Reads one JSON object that names a function and its arguments, character by character.

The arguments are passed on unparsed as they arrive: parsing them again for every token would take quadratic time,
and the result for a partial text would depend on where it was cut.
"""

from __future__ import annotations

import json
from enum import Enum, auto

from sempre.engine.parsing.pieces import well_formed

_WHITE_SPACE = " \t\r\n"
_CLOSING = {"{": "}", "[": "]"}
_ARGUMENT_KEYS = ("arguments", "parameters")


class _At(Enum):
    OBJECT = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    INSIDE_VALUE = auto()
    COMMA_OR_END = auto()


class CallScanner:
    """Feed it text until `done` or `malformed`.

    `name` is set as soon as it is complete; from then on `take_arguments` returns the new text of the arguments, and
    until then `raw` is all that was read. Strings and brackets are tracked; the text between them is not checked,
    except for `<`, which begins a tag and never occurs in JSON. A call without its last bracket ends where something
    else begins. Null means no arguments, and JSON text in a string is unwrapped.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.malformed = False
        self._raw: list[str] = []
        self._at = _At.OBJECT
        self._key = ""
        self._value: list[str] = []
        self._closing: list[str] = []
        self._in_string = False
        self._escaped = False
        self._arguments: list[str] = []
        self._has_arguments = False
        self._unread = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def take_arguments(self) -> str:
        """New text of the arguments; "{}" at the end of a call that has none."""
        if self.name is None:
            return ""
        if self.done and not self._has_arguments:
            self._has_arguments = True
            self._arguments.append("{}")
        news = "".join(self._arguments)
        self._arguments.clear()
        return news

    def take_cut_off(self) -> str:
        """The arguments kept so far, when their end is missing."""
        value = "".join(self._value) if self._at is _At.INSIDE_VALUE and self._keeps_value() else ""
        self._value.clear()
        return "" if "null".startswith(value) else value

    def feed(self, text: str) -> str:
        """Read `text` to the end of the object or the first error; return the rest."""
        for position, character in enumerate(text):
            if self.done or self.malformed:
                return text[position:]
            if self.name is None:
                self._raw.append(character)
            if self._at is _At.INSIDE_VALUE:
                self._feed_value(character)
            elif self._in_string:
                self._feed_key(character)
            elif character not in _WHITE_SPACE:
                self._feed_between(character)
            if self._unread:
                return text[position:]
        return ""

    def _feed_between(self, character: str) -> None:
        match self._at, character:
            case _At.OBJECT, "{":
                self._at = _At.KEY_OR_END
            case ((_At.KEY_OR_END | _At.COMMA_OR_END), "}"):
                self.done = self.name is not None
                self.malformed = not self.done
            case ((_At.KEY_OR_END | _At.KEY), '"'):
                self._key, self._in_string = character, True
            case _At.COLON, ":":
                self._at = _At.VALUE
            case _At.COMMA_OR_END, ",":
                self._at = _At.KEY
            case _At.VALUE, _ if character not in ",:]}<":
                self._at = _At.INSIDE_VALUE
                self._value.clear()
                self._feed_value(character)
            case _ if self.name is not None:
                self.done = self._unread = True
            case _:
                self.malformed = True

    def _feed_key(self, character: str) -> None:
        self._key += character
        if self._string_ends(character):
            key = _decoded(self._key)
            self.malformed = not isinstance(key, str)
            self._key, self._at = str(key), _At.COLON

    def _feed_value(self, character: str) -> None:
        if self._in_string:
            self._add(character)
            if self._string_ends(character) and not self._closing:
                self._end_value()
        elif character == '"' and (self._closing or not self._value):
            self._in_string = True
            self._add(character)
        elif character in _CLOSING and (self._closing or not self._value):
            self._closing.append(_CLOSING[character])
            self._add(character)
        elif self._closing:
            self._feed_nested(character)
        elif character in _WHITE_SPACE or character in ",}<":
            self._end_value()
            if character not in _WHITE_SPACE:
                self._feed_between(character)
        elif character in '"{[]:':
            self.malformed = True
        else:
            self._add(character)

    def _feed_nested(self, character: str) -> None:
        if character == "<":
            self.malformed = self._unread = True
            return
        self._add(character)
        if character not in "}]":
            return
        if character != self._closing.pop():
            self.malformed = True
        elif not self._closing:
            self._end_value()

    def _add(self, character: str) -> None:
        self._value.append(character)
        if self._is_argument() and not self._keeps_value():
            self._arguments.append(character)

    def _is_argument(self) -> bool:
        return self._key in _ARGUMENT_KEYS and not self._has_arguments

    def _keeps_value(self) -> bool:
        """Whether the arguments are not an object, so that their end decides what they mean."""
        return self._is_argument() and bool(self._value) and self._value[0] not in _CLOSING

    def _end_value(self) -> None:
        self._at = _At.COMMA_OR_END
        if self._keeps_value():
            text = "".join(self._value)
            value = _decoded(text)
            if text != "null":
                self._has_arguments = True
                unwrapped = isinstance(value, str) and isinstance(_decoded(value), dict)
                self._arguments.append(str(value) if unwrapped else text)
        elif self._key in _ARGUMENT_KEYS:
            self._has_arguments = True
        elif self._key == "name" and self.name is None:
            name = _decoded("".join(self._value))
            if isinstance(name, str) and name:
                self.name = name
            else:
                self.malformed = True

    def _string_ends(self, character: str) -> bool:
        """Track a string; return whether this quotation mark ends it."""
        if self._escaped:
            self._escaped = False
            return False
        self._escaped = character == "\\"
        # a key's opening mark is read elsewhere, a value's has already set the flag
        if character == '"':
            self._in_string = False
        return character == '"'


def _decoded(text: str) -> object:
    """The value of JSON text; None if it is none, or is nested too deeply."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return well_formed(value) if isinstance(value, str) else value
