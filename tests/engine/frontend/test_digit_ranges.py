"""Expressions of ranges of numbers against brute force."""

from __future__ import annotations

import random
import re
from decimal import Decimal

import pytest

from sempre.engine.frontend.digit_ranges import integers_between, numbers_between

SMALL = 130


def _matches(expression: str | None, text: str) -> bool:
    return expression is not None and re.fullmatch(expression, text) is not None


def test_small_ranges_of_integers_exhaustively() -> None:
    every = [(value, str(value)) for value in range(-SMALL, SMALL + 1)]
    bounds = [None, -120, -101, -100, -99, -37, -10, -9, -2, -1, 0, 1, 2, 9, 10, 11, 42, 99, 100, 101, 119, 120]
    for low in bounds:
        for high in bounds:
            expression = integers_between(low, high)
            for value, text in every:
                is_inside = (low is None or value >= low) and (high is None or value <= high)
                assert _matches(expression, text) == is_inside, (low, high, value, expression)
            assert not any(_matches(expression, text) for text in ("-0", "", "-", "00", "01", "1.0", "1e1", "+1"))


def test_every_pair_of_small_naturals() -> None:
    for low in range(115):
        for high in range(low - 1, 115):
            expression = integers_between(low, high)
            found = [value for value in range(125) if _matches(expression, str(value))]
            assert found == list(range(low, high + 1)), (low, high, expression)


@pytest.mark.parametrize("power", [53, 62, 63, 64, 100, 1000])
def test_large_ranges_of_integers_near_their_ends(power: int) -> None:
    generator = random.Random(power)
    for _ in range(40):
        low, high = sorted(generator.choice([-1, 1]) * generator.randrange(2**power) for _ in range(2))
        expression = integers_between(low, high)
        near = [end + step for end in (low, high) for step in (-10, -1, 0, 1, 10, 999, -999)]
        inside = [generator.randint(low, high) for _ in range(20)]
        scaled = [value * 10 for value in inside] + [value // 10 for value in inside] + [-value for value in inside]
        for value in [*near, *inside, *scaled]:
            assert _matches(expression, str(value)) == (low <= value <= high), (low, high, value)
    assert _matches(integers_between(2**power, None), str(2**power + 7**power))
    assert not _matches(integers_between(2**power, None), str(2**power - 1))
    assert _matches(integers_between(None, -(2**power)), str(-(2**power)))
    assert not _matches(integers_between(None, -(2**power)), str(-(2**power) + 1))


def test_numbers_with_decimals() -> None:
    bounds = [None, -101, -10, -1, 0, 1, 9, 10, 100]
    texts = [f"{value}.{decimals}" for value in range(-12, 13) for decimals in ("0", "5", "00", "99")]
    texts += [str(value) for value in range(-102, 103)] + ["-0.5", "-0.0", "-10.01", "100.01", "100.00", "-101.1"]
    for low in bounds:
        for high in bounds:
            expression = numbers_between(low, high, 2)
            for text in texts:
                value = Decimal(text)
                is_inside = (low is None or value >= low) and (high is None or value <= high)
                if value == 0 and text.startswith("-"):
                    is_inside = is_inside and (low is None or low < 0)
                assert _matches(expression, text) == is_inside, (low, high, text, expression)
            assert not _matches(expression, "5.123")
    assert _matches(numbers_between(0, 9), "5.12345")


def test_nothing_lies_between_bounds_that_cross() -> None:
    assert integers_between(3, 2) is None
    assert integers_between(0, -1) is None
    assert numbers_between(3, 2) is None
