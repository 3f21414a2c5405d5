"""Which known name a mistyped one probably means; never one that means the opposite."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_NEGATIONS = frozenset({"no", "not", "disable", "disabled", "without", "skip"})
_LONG_NEGATIONS = tuple(sorted(word for word in _NEGATIONS if len(word) > 4))
_OPPOSITES = (
    ("allow", "deny"),
    ("before", "after"),
    ("begin", "end"),
    ("first", "last"),
    ("include", "exclude"),
    ("input", "output"),
    ("least", "most"),
    ("max", "min"),
    ("prefix", "suffix"),
    ("start", "stop"),
)


def near_name(name: str, known: Iterable[str]) -> str | None:
    """The name in `known` nearest to `name` that does not mean the opposite, or None."""
    return next(iter(near_names(name, known)), None)


def near_names(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Names in `known` that `name` could mean, nearest first; `cutoff` from 0 (all) to 1 (only an equal name)."""
    return [other for other in difflib.get_close_matches(name, known, n=8, cutoff=cutoff) if not _opposed(name, other)]


def _opposed(one: str, other: str) -> bool:
    """`disable-x` and `enable-x`, `x` and `no-x`, `max-x` and `min-x`; not `disable-x` and `no-enable-x`."""
    ours, theirs = _words(one), _words(other)
    if _is_negated(ours) != _is_negated(theirs):
        return True
    return any({a, b} <= set(ours) ^ set(theirs) and (a in ours) == (b in theirs) for a, b in _OPPOSITES)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-_.\s]+", name.lower()) if word]


def _is_negated(words: list[str]) -> bool:
    return sum(word in _NEGATIONS or _is_mistyped_negation(word) for word in words) % 2 == 1


def _is_mistyped_negation(word: str) -> bool:
    """With a letter or the separator after it left out; a short one is as near to too many other words."""
    return word.startswith(_LONG_NEGATIONS) or bool(difflib.get_close_matches(word, _LONG_NEGATIONS, cutoff=0.9))
