"""Bounded patterns of property names: each matches only names that the original pattern matches."""

from __future__ import annotations

import re

KEY_LENGTH = 20
_COMPARED = 4
"""Characters used to distinguish names, which keeps the pattern small: names that share more are left out."""
_PART = re.compile(r"\\.|\{(\d+),\}|.", re.DOTALL)


def other_names(names: list[str]) -> str:
    """A pattern of short names that are not among `names`."""
    if not any(names):
        return f"^(?s:.{{1,{KEY_LENGTH}}})$"
    return f"^(?:{_others(sorted(filter(None, names)), 0)})$"


def _others(names: list[str], depth: int) -> str:
    """An expression that matches none of the names, branching at every character like a trie."""
    tails: dict[str, list[str]] = {}
    for name in names:
        if name:
            tails.setdefault(name[0], []).append(name[1:])
    if not tails:
        return f"(?s:.{{1,{KEY_LENGTH}}})"
    others = "".join(map(re.escape, tails))
    cases = [f"[^{others}](?s:.{{0,{KEY_LENGTH - 1}}})"]
    if depth < _COMPARED:
        cases += [f"{re.escape(first)}(?:{_others(rest, depth + 1)})" for first, rest in tails.items()]
    if depth and "" not in names:
        cases.append("")
    return "|".join(cases)


def short_names(pattern: str) -> str | None:
    """`pattern` with every repetition and the name bounded; None if that cannot be derived from its text."""
    parts, depth, flat = [], 0, []
    for found in _PART.finditer(pattern):
        part = found.group()
        is_plain = depth == 0 and len(part) == 1
        depth += part == "["
        if not is_plain and depth == 0 and found.group(1):
            part = f"{{{found.group(1)},{max(int(found.group(1)), KEY_LENGTH)}}}"
        elif is_plain and part in "*+":
            # a `+` may follow another repetition
            part = f"{{{int(part == '+')},{KEY_LENGTH}}}"
        depth -= part == "]" and depth > 0
        parts.append(part)
        flat += [part] if is_plain and part in "^$|" else []
    at_start, at_end = bool(parts) and parts[0] == "^", bool(parts) and parts[-1] == "$"
    if depth or flat.count("^") != at_start or flat.count("$") != at_end or ("|" in flat and (at_start or at_end)):
        return None
    inner = "".join(parts[at_start : len(parts) - at_end])
    any_more = f"(?s:.{{0,{KEY_LENGTH}}})"
    return f"^{'' if at_start else any_more}(?:{inner}){'' if at_end else any_more}$"
