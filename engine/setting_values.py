"""Values of settings: types and ranges from a setting's annotation, and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from operator import ge, gt, le
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from sempre.ipc.errors import ConfigError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WITH_B = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {**_DECIMAL, **_BINARY, **_WITH_B, **{f"{unit}iB": size for unit, size in _BINARY.items()}, "B": 1}
_FORM = re.compile(r"\s*(-?\d+)(\.\d+)?\s*([A-Za-z]*)\s*")
_EXAMPLES = "2048, 2k (2000), 2K (2048) or 4GiB"
_BOUNDS = {"ge": (ge, "at least"), "gt": (gt, "greater than"), "le": (le, "at most")}
_WORDS: dict[Any, str] = {
    int: "an int", float: "a number", str: "a string", bool: "True or False", NoneType: "None", dict: "a mapping",
    list: "a list of strings",
}  # fmt: skip


def checked(name: str, value: object, hint: Any, shown: str | None = None) -> Any:
    """Return `value` as the type that `hint` annotates; a size may be a string. Errors show `shown`, if given.

    Raises ConfigError naming the setting, what is expected and what was found.
    """
    parameter = name.partition("[")[0]
    if isinstance(value, str) and any((meta.extra or {}).get("is_size") for meta in _said_of(hint)):
        try:
            value = read_size(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}.", parameter=parameter, value=value) from None
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        expected = _range_missed(value, hint) or f"must be {' or '.join(map(_words, options(hint)))}"
        if isinstance(value, Mapping) and any(issubclass(kind, msgspec.Struct) for kind in _classes(hint)):
            expected += f" ({error})"
        raise ConfigError(f"{name} {expected}, got {shown or repr(value)}.", parameter=parameter, value=value) from None


def options(hint: Any) -> tuple[Any, ...]:
    """Return the types that a setting may have, without annotations."""
    if get_origin(hint) is Annotated:
        return options(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(option for member in get_args(hint) for option in options(member))
    return (hint,)


def _classes(hint: Any) -> Iterator[type]:
    return (option for option in options(hint) if isinstance(option, type))


def description(hint: Any) -> str:
    """Return the description of a setting."""
    return next((meta.description for meta in _said_of(hint) if meta.description is not None), "")


def _said_of(hint: Any) -> Iterator[Meta]:
    yield from getattr(hint, "__metadata__", ())
    if get_origin(hint) in (Annotated, Union, UnionType):
        for part in get_args(hint):
            yield from _said_of(part)


def _range_missed(value: Any, hint: Any) -> str | None:
    """Return the bound of `hint` that a value of its type violates."""
    if isinstance(value, bool) or not isinstance(value, int | float if float in options(hint) else int):
        return None
    for meta in _said_of(hint):
        if meta.ge is not None and meta.ge == meta.le:
            return f"can only be {meta.ge} for now"
        for bound, (keeps, words) in _BOUNDS.items():
            limit = getattr(meta, bound)
            if limit is not None and not keeps(value, limit):
                return f"must be {words} {limit}"
    return None


def _words(option: Any) -> str:
    """Return a type in words."""
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    return _WORDS.get(get_origin(option) or option, "a mapping of its fields")


def read_size(text: str) -> int:
    """Return the number that a size means: k, m, g, t, kB, MB, GB, TB are decimal, K, M, G, T, KiB, … are binary.

    Raises ValueError for anything else and for fractions.
    """
    match = _FORM.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[3])
    if match is None or unit is None:
        raise ValueError(f"expected an integer such as {_EXAMPLES}, got {text!r}")
    whole, digits = match[1], (match[2] or ".")[1:]
    parts: int = 10 ** len(digits)
    number, rest = divmod(int(whole + digits) * unit, parts)
    if rest:
        raise ValueError(f"expected an integer such as {_EXAMPLES}, got {text!r}, which has a fraction")
    return number
