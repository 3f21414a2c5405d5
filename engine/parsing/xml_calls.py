"""Tool calls whose parameters are elements: Qwen3-Coder and Seed-OSS.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    value
    </parameter>
    </function>
    </tool_call>

Values are texts; the tool's schema says which of them are JSON. Each parameter is passed on once it is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from sempre.engine.parsing.pieces import Arguments, Piece, split_before_tag
from sempre.engine.parsing.tool_calls import AroundCalls, Schema

_WORDS = {"True": "true", "False": "false", "None": "null"}
_FUNCTION = re.compile(r"\s*<function=([^<>]+)>")
# how long a tag may be
_LONGEST_TAG = 512
_PARAMETER_BEGIN, _PARAMETER_END, _FUNCTION_END = "<parameter=", "</parameter>", "</function>"
_PARAMETER = re.compile(rf"{_PARAMETER_BEGIN}([^<>]{{1,{_LONGEST_TAG}}})>")


class _At(Enum):
    CONTENT = auto()
    BEGUN = auto()
    """after the tag that begins a call"""
    FUNCTION = auto()
    VALUE = auto()
    ENDED = auto()
    """after the function, before the tag that ends the call"""


class Qwen3CoderParser(AroundCalls):
    """A call that names no function is content, unchanged; one that is cut off has the parameters that are complete."""

    START, END = "<tool_call>", "</tool_call>"

    def __init__(self, schemas: Mapping[str, Schema | None] | None = None) -> None:
        """`schemas`: those of the parameters of each function."""
        super().__init__()
        self._schemas = schemas or {}
        self._text = ""
        self._at = _At.CONTENT
        self._name = self._key = ""
        self._num_parameters = 0
        # where the end of a value may be
        self._seen = 0

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        is_cut_tag = self.END.startswith(self._text.strip())
        if self._at is _At.BEGUN:
            self._say(self.START + self._text)
        elif self._at is _At.CONTENT or (self._at is _At.ENDED and not is_cut_tag):
            self._say(self._text)
        self._text = ""
        return self._finish()

    def _step(self) -> bool:
        """Read some of the text; False if more is needed."""
        match self._at:
            case _At.CONTENT:
                return self._content()
            case _At.BEGUN:
                return self._begun()
            case _At.FUNCTION:
                return self._function()
            case _At.VALUE:
                return self._value()
            case _At.ENDED:
                return self._ended()

    def _content(self) -> bool:
        before, tag, after = self._text.partition(self.START)
        if tag:
            self._say(before)
            self._text, self._at = after, _At.BEGUN
            return True
        certain, self._text = split_before_tag(before, self.START)
        self._say(certain)
        return False

    def _begun(self) -> bool:
        found = _FUNCTION.match(self._text)
        if found is not None:
            self._name, self._text = found[1].strip(), self._text[found.end() :]
            self._at, self._num_parameters = _At.FUNCTION, 0
            self._start_call(self._name)
            return True
        begin = self._text.lstrip()
        if len(begin) < _LONGEST_TAG and (
            "<function=".startswith(begin) or (begin.startswith("<function=") and not set(begin[1:]) & set("<>"))
        ):
            return False
        self._say(self.START)
        self._at = _At.CONTENT
        return True

    def _function(self) -> bool:
        """Between parameters, where other text is left out."""
        found = _PARAMETER.search(self._text)
        ends = [place for tag in (_FUNCTION_END, self.END) if (place := self._text.find(tag)) >= 0]
        if found is not None and not any(place < found.start() for place in ends):
            self._key, self._text = found[1].strip(), self._text[found.end() :]
            self._at, self._seen = _At.VALUE, 0
            return True
        if not ends:
            self._text = self._cut_tag()
            return False
        self._argue("}" if self._num_parameters else "{}")
        place = min(ends)
        is_function = self._text.startswith(_FUNCTION_END, place)
        self._text = self._text[place + len(_FUNCTION_END if is_function else self.END) :]
        self._at = _At.ENDED if is_function else _At.CONTENT
        return True

    def _cut_tag(self) -> str:
        """The end of the text, if a tag that is looked for may begin there; none of them has another `<` in it."""
        place = self._text.rfind("<")
        end = self._text[place:] if place >= 0 else ""
        is_cut = any(tag.startswith(end) for tag in (_PARAMETER_BEGIN, _FUNCTION_END, self.END))
        is_named = end.startswith(_PARAMETER_BEGIN) and len(end) <= len(_PARAMETER_BEGIN) + _LONGEST_TAG
        return end if is_cut or (is_named and ">" not in end) else ""

    def _value(self) -> bool:
        place = self._text.find(_PARAMETER_END, self._seen)
        if place < 0:
            self._seen = max(0, len(self._text) - len(_PARAMETER_END))
            return False
        value, self._text = self._text[:place], self._text[place + len(_PARAMETER_END) :]
        self._at = _At.FUNCTION
        self._num_parameters += 1
        pair = f"{json.dumps(self._key, ensure_ascii=False)}: {self._json(value.removeprefix(chr(10)))}"
        self._argue(("{" if self._num_parameters == 1 else ", ") + pair)
        return True

    def _ended(self) -> bool:
        begin = self._text.lstrip()
        if begin.startswith(self.END):
            self._text, self._at = begin[len(self.END) :], _At.CONTENT
            return True
        if self.END.startswith(begin):
            return False
        self._at = _At.CONTENT
        return True

    def _argue(self, text: str) -> None:
        self._pieces.append(Arguments(self._num_calls - 1, text))

    def _json(self, value: str) -> str:
        """A value as JSON."""
        text = value.removesuffix("\n")
        properties = (self._schemas.get(self._name) or {}).get("properties")
        kinds = _kinds(properties.get(self._key)) if isinstance(properties, Mapping) else set()
        word = _WORDS.get(text.strip(), text.strip())
        if kinds and (word == "null" if "string" in kinds else True) and _is_json(word):
            return word
        return json.dumps(text, ensure_ascii=False)


class SeedOssParser(Qwen3CoderParser):
    """The same with the tags of Seed-OSS."""

    START, END = "<seed:tool_call>", "</seed:tool_call>"


def _kinds(schema: Any) -> set[str]:
    """The types that a schema names; none where it does not say, or is no schema: nobody has checked it."""
    if not isinstance(schema, Mapping):
        return set()
    found = {each for each in _listed(schema.get("type")) if isinstance(each, str)}
    for key in ("anyOf", "oneOf"):
        for each in _listed(schema.get(key)):
            found |= _kinds(each)
    if not found:
        for value in _listed(schema.get("enum")):
            found.add("string" if isinstance(value, str) else "other")
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _is_json(text: str) -> bool:
    def refuse(_text: str) -> None:
        raise ValueError

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
