"""Values as JSON: plain ones of any object, and the canonical form of RFC 8785, which is what receipts sign."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

# beyond it a double no longer holds every integer; RFC 8785 wants larger ones as strings
MAX_EXACT_INTEGER = 2**53 - 1


def json_ready(value: Any) -> Any:
    """Return `value` with objects as dicts, sequences as lists, string keys, and numbers that JSON lacks as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_ready(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's, which most programs that use an engine need not import
        return json_ready(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_ready(getattr(value, field.name)) for field in fields(value)}
    return value


def canonical_json(value: Any) -> bytes:
    """Return the canonical form of RFC 8785: sorted names, no spaces, numbers as ECMAScript writes them, UTF-8.

    Raises ValueError for a number that the form does not have (NaN, infinities, integers beyond 2**53 - 1), a lone
    surrogate, or a name that is not a string; TypeError for anything but JSON's types.
    """
    return _text(value).encode()


def _text(value: Any) -> str:
    match value:
        case None | bool():
            return json.dumps(value)
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int():
            if abs(value) > MAX_EXACT_INTEGER:
                raise ValueError(f"expected an integer of at most 2**53 - 1, found {value}; write it as a string")
            return str(value)
        case float():
            return ecmascript_number(value)
        case dict():
            names = sorted(value, key=_utf16)
            return "{" + ",".join([f"{_text(name)}:{_text(value[name])}" for name in names]) + "}"
        case list():
            return "[" + ",".join(map(_text, value)) + "]"
    raise TypeError(f"expected a JSON value, found {type(value).__name__}")


def _utf16(name: Any) -> bytes:
    if not isinstance(name, str):
        raise ValueError(f"expected names that are strings, found {name!r}")
    return name.encode("utf-16-be")


def ecmascript_number(value: float) -> str:
    """Return a double as ECMAScript's Number::toString writes it: the shortest digits that read back to it.

    Raises ValueError for NaN and infinities.
    """
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value}")
    if value == 0.0:
        return "0"
    sign = "-" if value < 0 else ""
    # Python's repr has the same shortest digits, in another notation
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    point = len(whole) + int(exponent or 0)
    digits = (whole + fraction).lstrip("0")
    point -= len(whole + fraction) - len(digits)
    digits = digits.rstrip("0")
    return sign + _notation(digits, point)


def _notation(digits: str, point: int) -> str:
    """Place the decimal point: the value is 0.digits times ten to the power of `point`."""
    if len(digits) <= point <= 21:
        return digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return "0." + "0" * -point + digits
    shown = digits if len(digits) == 1 else f"{digits[0]}.{digits[1:]}"
    return f"{shown}e{'+' if point > 0 else '-'}{abs(point - 1)}"
