"""Sizes as people write them: 2048, 2k, 2K, 4GiB."""

from __future__ import annotations

import re

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WITH_B = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {**_DECIMAL, **_BINARY, **_WITH_B, **{f"{unit}iB": size for unit, size in _BINARY.items()}, "B": 1}
_FORM = re.compile(r"\s*(-?\d+)(\.\d+)?\s*([A-Za-z]*)\s*")
EXAMPLES = "2048, 2k (2000), 2K (2048) or 4GiB"


def read_size(text: str) -> int:
    """Return the number that a size says: k, m, g, t, kB, MB, GB, TB are decimal, K, M, G, T, KiB, … are binary.

    Raises ValueError for anything else, and for parts of one.
    """
    match = _FORM.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[3])
    if match is None or unit is None:
        raise ValueError(f"expected an integer such as {EXAMPLES}, got {text!r}")
    whole, digits = match[1], (match[2] or ".")[1:]
    parts: int = 10 ** len(digits)
    number, rest = divmod(int(whole + digits) * unit, parts)
    if rest:
        raise ValueError(f"expected an integer such as {EXAMPLES}, got {text!r}, which has a fraction")
    return number
