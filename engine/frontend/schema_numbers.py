"""Adapts numbers in schemas to the grammar library, which reads every number as a float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

Schema = dict[str, Any]

EXACT = "x-exact-range"
"""The keyword for integer bounds, low and high as text, that the library would misread; `otherwise` says why nothing
can replace them."""
LARGEST = 2**63 - 1024
"""The largest float64 below 2^63: the library counts digits in int64."""
MOST_REMAINDERS = 8192
"""Total for all `multipleOf`: with a few more, the library aborts a running request."""
_COSTS = {10_000: 1000}
"""Steps with more remainders that work anyway, as tried, and what they count for."""
_INT64_END = 2**63
"""As the maximum of an integer: the library clamps values beyond int64 to the largest int64."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def rewrite_numbers(schema: Schema) -> None:
    """Make bounds inclusive and exact, in place.

    A bound beyond 2^53 moves inward to the nearest float64, and one beyond int64 into int64, so nothing outside is ever
    allowed; the limit of int64 itself is kept. If that loses a number, EXACT keeps the original bounds. Raises
    ValueError for bounds that leave nothing.
    """
    schema.pop(EXACT, None)
    _from_draft_4(schema)
    for word in _BOUNDS:
        value = schema.get(word)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{word} must be a number, found {value!r}.")
    given = {word: _exact(schema[word]) for word in _BOUNDS if schema.get(word) is not None}
    if not given or all(abs(value) < 2**53 for value in given.values()):
        return
    is_integer = kinds_of(schema) & {"integer", "number"} == {"integer"}
    for word in _BOUNDS:
        if word in given and (is_integer or abs(given[word]) >= 2**53):
            del schema[word]
    for pair, sign in ((_BOUNDS[::2], 1), (_BOUNDS[1::2], -1)):
        # if one bound is beyond 2^53 and one within, the sign decides which is tighter
        if len(set(pair) & set(given)) == 2 and len(set(pair) & set(schema)) == 1:
            far = next(word for word in pair if word not in schema)
            if given[far] * sign > 0:
                schema.pop(next(word for word in pair if word in schema))
            else:
                given.pop(far)
    low, high = _whole_bounds({word: value for word, value in given.items() if word not in schema})
    if low is not None and high is not None and low > high:
        raise ValueError(f"minimum {low} is greater than maximum {high}.")
    exact = {"low": None if low is None else str(low), "high": None if high is None else str(high)}
    try:
        _take_inside(schema, low, high, is_integer=is_integer)
    except ValueError as error:
        if "type" in schema:
            schema[EXACT] = {**exact, "otherwise": str(error)}
            return
        # any other type is allowed
        for word in (*_BOUNDS, "multipleOf"):
            schema.pop(word, None)
        schema["type"] = ["array", "boolean", "null", "object", "string"]
        return
    if (low is not None and schema["minimum"] != low) or (high is not None and not _is_kept(schema["maximum"], high)):
        schema[EXACT] = exact


def _take_inside(schema: Schema, low: int | None, high: int | None, *, is_integer: bool) -> None:
    """Set bounds that the library reads exactly."""
    if low is not None or not {"minimum", "exclusiveMinimum"} & set(schema):
        schema["minimum"] = -LARGEST if low is None else _float_inside(low, up=True)
    if high is not None or not {"maximum", "exclusiveMaximum"} & set(schema):
        is_int64 = is_integer and high is not None and high >= _INT64_END - 1
        schema["maximum"] = _INT64_END if is_int64 else LARGEST if high is None else _float_inside(high, up=False)
    if schema.get("minimum", -LARGEST) > schema.get("maximum", LARGEST):
        raise ValueError("no number between the bounds can be represented exactly.")


def _is_kept(maximum: int, high: int) -> bool:
    return maximum == high or (maximum == _INT64_END and high == _INT64_END - 1)


def kinds_of(schema: Schema) -> set[str]:
    """The types that a schema names."""
    kinds = schema.get("type")
    return set(kinds) if isinstance(kinds, list) else {kinds} if isinstance(kinds, str) else set()


def rewrite_values(schema: Schema) -> None:
    """Turn integers of `const` and `enum` that no float64 holds into ranges, in place, if nothing else is constrained.

    Raises ValueError for a remaining number, at any depth, that the library does not hold.
    """
    word = "const" if "const" in schema else "enum"
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and set(schema) <= {word, "type", EXACT}:
        large = [value for value in values if isinstance(value, int) and not _is_held(value)]
        if large and (not kinds_of(schema) or kinds_of(schema) & {"integer", "number"}):
            rest = [value for value in values if not any(value is other for other in large)]
            cases: list[Schema] = [_single(value) for value in large]
            if rest:
                cases.append({"enum": rest, **({"type": schema["type"]} if "type" in schema else {})})
            schema.clear()
            schema.update(cases[0] if len(cases) == 1 else {"anyOf": cases})
    for word in ("const", "enum"):
        if word in schema:
            check_exact(schema[word])


def _single(value: int) -> Schema:
    return {"type": "integer", "minimum": value, "maximum": value}


def check_multiples(multiples: Iterable[Any]) -> None:
    """Raise ValueError for `multipleOf` values that together have more remainders than the library can track."""
    total = 0
    for multiple in multiples:
        remainders = abs(int(_scaled(multiple)[0]))
        total += _COSTS.get(remainders, remainders)
        if total > MOST_REMAINDERS:
            raise ValueError(_too_many(f"multipleOf {multiple}"))


def check_common_multiple(multiples: Iterable[Any]) -> None:
    """Raise ValueError if the common multiple of one number's `multipleOf` values has too many remainders."""
    common, places = 1, 0
    for multiple in multiples:
        digits, exponent = _scaled(multiple)
        most = max(places, exponent)
        common = math.lcm(common * 10 ** (most - places), abs(int(digits)) * 10 ** (most - exponent))
        places = most
        if common > MOST_REMAINDERS:
            raise ValueError(_too_many(f"multipleOf {multiple} and the others of the same number"))


def _scaled(multiple: Any) -> tuple[int, int]:
    """A number's digits without the point (the number of remainders), and how many digits follow the point."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not math.isfinite(multiple):
        raise ValueError(f"multipleOf must be a number, found {multiple!r}.")
    number = Decimal(repr(multiple))
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    places = max(-exponent, 0)
    return int(number.scaleb(places)), places


def _too_many(what: str) -> str:
    return f"{what}: a grammar follows at most {MOST_REMAINDERS} remainders in all; leave it out."


def check_exact(value: Any) -> None:
    """Raise ValueError for a number, at any depth, that the library does not hold: it would generate another one."""
    for number in _numbers_in(value):
        if not _is_held(number):
            raise ValueError(f"the value {number} is beyond what a grammar can represent exactly.")


def check_range(root: Schema) -> None:
    """Raise ValueError for a number anywhere that may crash the library and with it the process.

    It negates numbers read as int64, also in parts that only the library reaches.
    """
    for number in _numbers_in(root):
        if not -LARGEST <= number <= _INT64_END:
            raise ValueError(f"the number {number} is beyond what a grammar can represent.")


def _is_held(number: int | float) -> bool:
    return abs(number) <= 2**53 or (abs(number) <= LARGEST and int(float(number)) == number)


def _numbers_in(value: Any) -> Iterator[int | float]:
    pending = [value]
    while pending:
        match pending.pop():
            case bool():
                pass
            case int() | float() as number:
                yield number
            case list() as items:
                pending += items
            case dict() as members:
                pending += members.values()


def _exact(value: int | float) -> Fraction:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a bound must be a finite number, found {value!r}.")
    return Fraction(value)


def _from_draft_4(schema: Schema) -> None:
    """In draft 4 the exclusive bounds are flags."""
    for flag, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(flag), bool):
            is_exclusive = schema.pop(flag)
            if is_exclusive and bound in schema:
                schema[flag] = schema.pop(bound)


def _whole_bounds(given: dict[str, Fraction]) -> tuple[int | None, int | None]:
    """The smallest and the largest integer that all bounds allow."""
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
    """The nearest integer that a float64 holds, not below (`up`) or not above `value`, within ±LARGEST."""
    if up and value <= -LARGEST:
        return -LARGEST
    if not up and value >= LARGEST:
        return LARGEST
    if abs(value) > LARGEST:
        raise ValueError(f"the bound {value} is beyond what a grammar can represent.")
    nearest = float(value)
    if (int(nearest) < value) if up else (int(nearest) > value):
        nearest = math.nextafter(nearest, math.inf if up else -math.inf)
    return int(nearest)
