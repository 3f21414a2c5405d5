"""Checks of single parameters from users: each returns the value in its proper type, or raises."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from sempre.ipc.errors import ConfigError

FLOAT32_SMALLEST = 2.0**-126
"""Smallest normal float32: a smaller divisor loses bits or is zero."""
FLOAT32_LARGEST = (2.0 - 2.0**-23) * 2.0**127
MAX_LOGIT_BIAS = 100.0
_TOKEN_ID = re.compile(r"-?[0-9]{1,20}")
_MOST_SHOWN = 8


class _Repr(reprlib.Repr):
    """Like repr, but never long, and it never raises."""

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"


_REPR = _Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20
_REPR.maxlevel = 2


def shown(value: object) -> str:
    """Return `value` as an error text shows it: its repr, shortened where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= 400 else text[:400] + "…"


def refusal(name: str, value: object, rest: str) -> ConfigError:
    """Return the error of one parameter; `rest` follows its name."""
    return ConfigError(f"{name} {rest}", parameter=name, value=value)


def integer(name: str, value: object, rest: str = "must be an int, got {value}.", *, floats: bool = True) -> int:
    """Return an int for any integer type and, with `floats`, for a whole float; a bool is refused."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if floats and isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer():
        return int(float(value))
    raise refusal(name, value, rest.format(value=shown(value), type=type(value)))


def number(name: str, value: object) -> float:
    """Return a float, which may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refusal(name, value, f"must be a number, got {shown(value)}.")
    try:
        return float(value)
    except OverflowError:
        raise refusal(name, value, "is too large for a float.") from None


def finite(name: str, value: object) -> float:
    """Return a finite float."""
    result = number(name, value)
    if not math.isfinite(result):
        raise refusal(name, result, f"must be a finite number, got {result}.")
    return result


def within_float32(name: str, value: float) -> float:
    """Return a positive `value` that is a normal number in float32, which sampling uses."""
    if value < FLOAT32_SMALLEST:
        raise refusal(name, value, f"must be at least {FLOAT32_SMALLEST:.6g}, float32's smallest, got {value}.")
    if value > FLOAT32_LARGEST:
        raise refusal(name, value, f"must be at most {FLOAT32_LARGEST:.6g}, float32's largest, got {value}.")
    return value


def boolean(name: str, value: object) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise refusal(name, value, f"must be True or False, got {shown(value)}.")
    return value


def strings(name: str, value: object) -> list[str]:
    """Return a list of strings; None is the empty one."""
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise refusal(name, value, f"must contain only strings, got {shown(value)}.")
    return list(value)


def token_ids(name: str, value: object) -> list[int]:
    """Return a list of ints; the vocabulary is checked later, when the model is known."""
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return value.copy()
    valid = isinstance(value, Sequence) and all(
        isinstance(item, Integral) and not isinstance(item, bool) for item in value
    )
    if not valid:
        raise refusal(name, value, f"must contain only integers, got {shown(value)}.")
    assert isinstance(value, Sequence)
    return [int(item) for item in value]


def token_id_rows(name: str, value: object) -> list[list[int]]:
    """Return lists of ints, none of which is below -1, from such lists or an integer array of two dimensions."""
    if getattr(getattr(value, "dtype", None), "kind", "") in ("i", "u"):
        value = value.tolist()  # type: ignore[attr-defined]
    if not isinstance(value, Sequence) or not all(isinstance(row, Sequence) for row in value) or not any(value):
        raise refusal(name, value, f"must be a list of lists of token ids, and not empty, got {shown(value)}.")
    rows = [token_ids(name, row) for row in value]
    lowest = min(min(row, default=0) for row in rows)
    if lowest < -1:
        raise refusal(name, value, f"must contain token ids, or -1 for none, got {shown(lowest)}.")
    return rows


def logit_bias(value: object) -> dict[int, float]:
    """Return biases by token id, within ±100."""
    if not isinstance(value, Mapping):
        raise refusal("logit_bias", value, f"must be a dict of token id to number, got {shown(value)}.")
    unfit = [key for key in value if isinstance(key, str) and not _TOKEN_ID.fullmatch(key)]
    if unfit:
        said = ", ".join(map(shown, unfit[:_MOST_SHOWN])) + (", …" if len(unfit) > _MOST_SHOWN else "")
        raise refusal("logit_bias", value, f"keys must be token ids, got {said}.")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        try:
            token_id = int(key) if isinstance(key, str) else integer("logit_bias", key)
        except ValueError:
            raise refusal("logit_bias", value, f"keys must be token ids, got {shown(key)}.") from None
        if token_id in bias:
            raise refusal("logit_bias", value, f"names token id {shown(token_id)} twice.")
        found = number("logit_bias", amount)
        if math.isnan(found):
            raise refusal("logit_bias", value, f"of token id {shown(token_id)} must be a number, got {found}.")
        bias[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, found))
    return bias
