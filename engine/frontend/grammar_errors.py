"""Turns the grammar library's errors into one sentence: its own quote the text and draw arrows below it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping

_EXPRESSION = re.compile(
    r"regex parse error:\n    (?P<text>.*)\n    (?P<gap> *)(?P<arrows>\^+).*\nerror: (?P<reason>.*)"
)
_PLACE = re.compile(r"(?:at )?(?P<line>\d+)\((?P<column>\d+)\): ")
_NEIGHBOURS = re.compile(r"lookarounds not supported yet; \w+ in regex /(?P<text>.*)/")
_LOOKS_AROUND = "it looks at the text around a match, by \\b, \\B or line anchors, which is not supported"
_MOST_SHOWN = 60


def reason(message: str, names: Mapping[str | None, str] | None = None) -> str:
    """Return a grammar or schema error without its drawing, on one line that ends with a full stop.

    `names`: regular expression → the field it came from.
    """
    message = message.strip()
    first = message.partition("\n")[0]
    place = _PLACE.match(first)
    where = "" if place is None else f"line {place['line']}, column {place['column']}: "
    if (found := _EXPRESSION.search(message)) is not None:
        text, start = found["text"], len(found["gap"])
        part = text[start : start + len(found["arrows"])]
        name = (names or {}).get(text, "regular expression")
        said = f"{name} {_quoted(text)}, {_position(start, part)}: {found['reason']}"
    elif (found := _NEIGHBOURS.search(message)) is not None:
        said = f"regular expression {_quoted(found['text'])}: {_LOOKS_AROUND}"
    else:
        said = first if place is None else first[place.end() :]
    return _sentence(where + said)


def expression_reason(message: str, expression: str, translate: Callable[[str], str]) -> str:
    """The same for an error about `expression`, which the library received as `translate(expression)`."""
    if (found := _EXPRESSION.search(message)) is not None:
        start, end = (
            _origin(expression, translate, found.end(name) - found.start("gap")) for name in ("gap", "arrows")
        )
        return _sentence(f"{_position(start, expression[start:end])}: {found['reason']}")
    if _NEIGHBOURS.search(message) is not None:
        return _sentence(_LOOKS_AROUND)
    return reason(message)


def _origin(expression: str, translate: Callable[[str], str], place: int) -> int:
    """Map a position in the translation to one in `expression`: some characters get a backslash before them."""
    return bisect_left(range(len(expression) + 1), place, key=lambda size: len(translate(expression[:size])))


def _position(start: int, part: str) -> str:
    return f"character {start + 1} ({_quoted(part)})" if part else f"character {start + 1}"


def _quoted(text: str) -> str:
    shown = text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"
    return repr(shown).replace("\\\\", "\\")


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith(".") else text + "."
