"""Bounds and values of numbers as the grammar library can keep them: it reads every number as a float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

Schema = dict[str, Any]

LARGEST = 2**63 - 1024
"""The largest float64 below 2^63: the library counts digits in int64."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def rewrite_numbers(schema: Schema) -> None:
    """Make bounds inclusive and exact, in place.

    A bound beyond 2^53 moves to the nearest float64 inside, and one beyond int64 into it, so nothing outside is ever
    allowed. Raises ValueError for bounds that leave nothing.
    """
    _from_draft_4(schema)
    for word in _BOUNDS:
        value = schema.get(word)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{word} must be a number, found {value!r}.")
    given = {word: _exact(schema[word]) for word in _BOUNDS if schema.get(word) is not None}
    if not given or all(abs(value) < 2**53 for value in given.values()):
        return
    kinds = schema.get("type")
    kinds = set(kinds) if isinstance(kinds, list) else {kinds}
    is_integer = "integer" in kinds and "number" not in kinds
    for word in _BOUNDS:
        if word in given and (is_integer or abs(given[word]) >= 2**53):
            del schema[word]
    low, high = _whole_bounds({word: value for word, value in given.items() if word not in schema})
    if low is not None or not {"minimum", "exclusiveMinimum"} & set(schema):
        schema["minimum"] = -LARGEST if low is None else _float_inside(low, up=True)
    if high is not None or not {"maximum", "exclusiveMaximum"} & set(schema):
        schema["maximum"] = LARGEST if high is None else _float_inside(high, up=False)
    if schema.get("minimum", -LARGEST) > schema.get("maximum", LARGEST):
        raise ValueError("no number that a grammar keeps exactly lies between the bounds.")


def check_exact(value: Any) -> None:
    """Raise ValueError for an integer, at any depth, that a float64 does not hold: another would be generated."""
    pending = [value]
    while pending:
        match pending.pop():
            case int() as number if abs(number) > 2**53 and (abs(number) > LARGEST or int(float(number)) != number):
                raise ValueError(f"the value {number} is beyond what a grammar keeps exactly.")
            case list() as items:
                pending += items
            case dict() as members:
                pending += members.values()


def _exact(value: int | float) -> Fraction:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a bound must be a finite number, found {value!r}.")
    return Fraction(value)


def _from_draft_4(schema: Schema) -> None:
    """There the exclusive bounds are flags."""
    for flag, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(flag), bool):
            is_exclusive = schema.pop(flag)
            if is_exclusive and bound in schema:
                schema[flag] = schema.pop(bound)


def _whole_bounds(given: dict[str, Fraction]) -> tuple[int | None, int | None]:
    """The least and the greatest integer that all bounds allow."""
    lows, highs = [], []
    if "minimum" in given:
        lows.append(math.ceil(given["minimum"]))
    if "exclusiveMinimum" in given:
        lows.append(math.floor(given["exclusiveMinimum"]) + 1)
    if "maximum" in given:
        highs.append(math.floor(given["maximum"]))
    if "exclusiveMaximum" in given:
        highs.append(math.ceil(given["exclusiveMaximum"]) - 1)
    return max(lows, default=None), min(highs, default=None)


def _float_inside(value: int, *, up: bool) -> int:
    """The nearest integer not below (`up`), or not above, that a float64 holds, within ±LARGEST."""
    if up and value <= -LARGEST:
        return -LARGEST
    if not up and value >= LARGEST:
        return LARGEST
    if abs(value) > LARGEST:
        raise ValueError(f"the bound {value} is beyond what a grammar keeps.")
    nearest = float(value)
    if (int(nearest) < value) if up else (int(nearest) > value):
        nearest = math.nextafter(nearest, math.inf if up else -math.inf)
    return int(nearest)
