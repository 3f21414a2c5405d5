"""Turns the arguments of a tool call as Gemma 4 writes them into JSON, as they arrive.

    {city:<|"|>Rome<|"|>,days:[1,2],unit:None}  →  {"city": "Rome", "days": [1, 2], "unit": null}

Keys are bare, or between quotation marks of either kind. Anything is read as something: a bare value that is no JSON
scalar is a string, a missing one is null, surplus brackets and commas are left out.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto

from sempre.engine.parsing.pieces import well_formed

_WHITE_SPACE = " \t\r\n"
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
# as JSON says them, and as Python does, which templates print
_WORDS = {"true": "true", "false": "false", "null": "null", "": "null"}
_WORDS |= {"True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]"}


class _At(Enum):
    KEY = auto()
    """of an object, or its end"""
    QUOTED_KEY = auto()
    COLON = auto()
    VALUE = auto()
    """or the end of an array"""
    BARE = auto()
    QUOTED = auto()
    """between the format's own quotation marks, a tag each"""
    JSON_STRING = auto()
    NEXT = auto()
    """after a value"""


class ArgumentsReader:
    """Feed it text and quotation marks, from the first bracket on, until `done`; `take` what is certain."""

    def __init__(self) -> None:
        self.done = False
        self._at = _At.VALUE
        self._open: list[str] = []
        # whether the innermost bracket has an item already
        self._has_items = False
        self._held: list[str] = []
        self._escaped = False
        self._out: list[str] = []

    @property
    def is_in_text(self) -> bool:
        """Whether it is between quotation marks of the format, so that all but those are text."""
        return self._at in (_At.QUOTED, _At.QUOTED_KEY)

    def take(self) -> str:
        """New JSON text."""
        news = "".join(self._out)
        self._out.clear()
        return news

    def feed(self, text: str) -> str:
        """Read `text`, which has no tags; return what follows the last bracket."""
        position = 0
        while position < len(text) and not self.done:
            if self._at is _At.QUOTED:
                self._out.append(_escaped(text[position:]))
                return ""
            # a character that ends a part is read again by the next one
            if self._read(text[position]):
                position += 1
        return text[position:]

    def quote(self) -> None:
        """Read one of the format's own quotation marks."""
        match self._at:
            case _At.QUOTED:
                self._out.append('"')
                self._at = _At.NEXT
            case _At.QUOTED_KEY:
                self._at = _At.COLON
            case _At.KEY:
                self._held.clear()
                self._at = _At.QUOTED_KEY
            case _At.COLON:
                self._end_key()
                self.quote()
            case _At.NEXT:
                self._at = self._item()
                self.quote()
            case _At.BARE | _At.JSON_STRING:
                self._held.append('"')
            case _At.VALUE:
                self._begin_value()
                self._out.append('"')
                self._at = _At.QUOTED

    def end(self) -> None:
        """Complete what is open: no more will come of this call."""
        self._end_part()
        if self._at in (_At.COLON, _At.QUOTED_KEY):
            self._end_key()
        if self._at is _At.VALUE and self._open[-1:] == ["{"]:
            self._scalar("")
        while self._open:
            self._close()

    def cut_off(self) -> None:
        """Write what is certain: the output has ended inside this call."""
        if self._at is _At.BARE and _NUMBER.fullmatch("".join(self._held)):
            self._end_part()

    def _read(self, character: str) -> bool:
        """Whether it has been used."""
        match self._at:
            case _At.KEY:
                return self._in_key(character)
            case _At.QUOTED_KEY:
                self._held.append(character)
            case _At.COLON:
                self._end_key()
                return character == ":" or character in _WHITE_SPACE
            case _At.VALUE:
                return self._at_value(character)
            case _At.BARE:
                if character in ",}]":
                    self._end_part()
                    return False
                self._held.append(character)
            case _At.JSON_STRING:
                self._in_json_string(character)
            case _At.NEXT:
                return self._after_value(character)
        return True

    def _in_key(self, character: str) -> bool:
        held = self._held
        if held[:1] == ['"'] and (len(held) == 1 or held[-1] != '"'):
            held.append(character)
        elif character == ":":
            self._end_key()
        elif character in ",}":
            if held:
                self._end_key()
                return False
            if character == "}":
                self._close()
        elif not held and character in _WHITE_SPACE + "{]":
            pass
        else:
            held.append(character)
        return True

    def _end_key(self) -> None:
        text = "".join(self._held).strip() if self._at is _At.KEY else "".join(self._held)
        self._held.clear()
        self._separate()
        self._out.append(json.dumps(_unquoted(text), ensure_ascii=False) + ": ")
        self._at = _At.VALUE

    def _at_value(self, character: str) -> bool:
        inside = self._open[-1:]
        if character in _WHITE_SPACE:
            return True
        if character in _CLOSING:
            self._begin_value()
            self._out.append(character)
            self._open.append(character)
            self._has_items = False
            self._at = self._item()
        elif character == '"':
            self._at = _At.JSON_STRING
        elif character == "," and inside == ["["]:
            pass
        elif character == "]" and inside == ["["]:
            self._close()
        elif character in ",}]":
            if inside == ["{"]:
                self._scalar("")
                return False
        else:
            self._at = _At.BARE
            return False
        return True

    def _in_json_string(self, character: str) -> None:
        if character == '"' and not self._escaped:
            self._end_part()
            return
        self._escaped = character == "\\" and not self._escaped
        self._held.append(character)

    def _after_value(self, character: str) -> bool:
        if character in _WHITE_SPACE:
            return True
        if character in "}]":
            if _CLOSING[self._open[-1]] == character:
                self._close()
            return True
        self._at = self._item()
        return character == ","

    def _item(self) -> _At:
        return _At.KEY if self._open[-1] == "{" else _At.VALUE

    def _begin_value(self) -> None:
        if self._open[-1:] == ["["]:
            self._separate()

    def _separate(self) -> None:
        if self._has_items:
            self._out.append(", ")
        self._has_items = True

    def _end_part(self) -> None:
        """A value ends here."""
        text = "".join(self._held)
        match self._at:
            case _At.QUOTED:
                self._out.append('"')
                self._at = _At.NEXT
            case _At.BARE:
                self._scalar(text.strip())
            case _At.JSON_STRING:
                self._escaped = False
                self._begin_value()
                self._out.append(json.dumps(_decoded(text), ensure_ascii=False))
                self._at = _At.NEXT
                self._held.clear()
            case _At.KEY if text.strip():
                self._end_key()

    def _scalar(self, text: str) -> None:
        self._held.clear()
        self._begin_value()
        written = text if _NUMBER.fullmatch(text) else _WORDS.get(text)
        self._out.append(json.dumps(text, ensure_ascii=False) if written is None else written)
        self._at = _At.NEXT

    def _close(self) -> None:
        self._out.append(_CLOSING[self._open.pop()])
        self._has_items = True
        self._at = _At.NEXT
        self.done = not self._open


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _decoded(text: str) -> str:
    """What a JSON string says, without its quotation marks; the text itself where it is none."""
    try:
        return well_formed(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text


def _unquoted(key: str) -> str:
    return _decoded(key[1:-1]) if len(key) > 1 and key[0] == key[-1] == '"' else key
