"""Regular expressions for ranges of integers and decimal numbers, exact for bounds of any size."""

from __future__ import annotations


def integers_between(low: int | None, high: int | None) -> str | None:
    """An expression for the integers in [low, high] in JSON, zero without a sign; None if there are none.

    None as a bound means unbounded.
    """
    parts = []
    if low is None or low < 0:
        most = None if low is None else -low
        least = 1 if high is None or high > -1 else -high
        parts += [f"-{part}" for part in _naturals(least, most)]
    if high is None or high >= 0:
        parts += _naturals(max(0, low or 0), high)
    return f"({'|'.join(parts)})" if parts else None


def numbers_between(low: int | None, high: int | None, most_decimals: int | None = None) -> str | None:
    """An expression for the decimal numbers in [low, high] without exponent; see integers_between.

    `most_decimals`: maximum digits after the point.
    """
    count = f"{{1,{most_decimals}}}" if most_decimals else "+"
    parts = []
    if low is None or low < 0:
        most, least = (None if low is None else -low), (-high if high is not None and high < 0 else 0)
        parts += [f"-{part}" for part in _decimals(least, most, count)]
    if high is None or high >= 0:
        parts += _decimals(max(0, low or 0), high, count)
    return f"({'|'.join(parts)})" if parts else None


def _decimals(low: int, high: int | None, count: str) -> list[str]:
    """Between natural numbers: any fraction after each number, only zeros after the last."""
    whole = _naturals(low, None if high is None else high - 1)
    parts = [f"({'|'.join(whole)})(\\.[0-9]{count})?"] if whole else []
    if high is not None and high >= low:
        parts.append(f"{high}(\\.0{count})?")
    return parts


def _naturals(low: int, high: int | None) -> list[str]:
    if high is not None and high < low:
        return []
    first = str(low)
    if high is None:
        return [*_of_one_length(first, "9" * len(first)), f"[1-9][0-9]{{{len(first)},}}"]
    last = str(high)
    if len(first) == len(last):
        return _of_one_length(first, last)
    parts = _of_one_length(first, "9" * len(first))
    if len(last) - len(first) > 1:
        parts.append(f"[1-9][0-9]{{{len(first)},{len(last) - 2}}}")
    return parts + _of_one_length("1" + "0" * (len(last) - 1), last)


def _of_one_length(first: str, last: str) -> list[str]:
    """Numbers from `first` to `last`, which have equally many digits."""
    rest = len(first) - 1
    if not rest:
        return [_digit(int(first), int(last))]
    if first[0] == last[0]:
        return [first[0] + _joined(_of_one_length(first[1:], last[1:]))]
    parts = []
    begin, end = int(first[0]), int(last[0])
    if first[1:] != "0" * rest:
        parts.append(first[0] + _joined(_of_one_length(first[1:], "9" * rest)))
        begin += 1
    if last[1:] != "9" * rest:
        parts.append(last[0] + _joined(_of_one_length("0" * rest, last[1:])))
        end -= 1
    if begin <= end:
        parts.append(f"{_digit(begin, end)}[0-9]{{{rest}}}")
    return parts


def _digit(first: int, last: int) -> str:
    return str(first) if first == last else f"[{first}-{last}]"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"
