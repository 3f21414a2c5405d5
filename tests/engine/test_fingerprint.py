"""The digest depends on every part that decides bits, and on nothing else; differences are told in words."""

from __future__ import annotations

import pytest

from sempre.engine.fingerprint import (
    ENVIRONMENT,
    fingerprint_bits,
    fingerprint_differences,
    fingerprint_digest,
    fingerprint_environment,
)
from sempre.engine.version import __version__

PARTS = {"weights": "abc", "dtype": "float32"}


def test_bits_are_sorted_and_the_engine_is_environment() -> None:
    assert list(fingerprint_bits(PARTS).items()) == [("dtype", "float32"), ("weights", "abc")]
    assert fingerprint_environment(PARTS) == {"engine": __version__}


def test_digest_is_stable() -> None:
    # A change of this value changes every user's recorded fingerprints.
    assert fingerprint_digest(PARTS) == "ecde28cf72a9155c"
    assert fingerprint_digest(dict(reversed(PARTS.items()))) == fingerprint_digest(PARTS)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_decides_no_bits_is_told_and_not_in_the_digest(name: str) -> None:
    one, other = ({**PARTS, name: value} for value in ("1", "2"))
    assert fingerprint_environment(one) == {name: "1"} | {"engine": __version__}
    assert fingerprint_bits(one) == fingerprint_bits(other) == fingerprint_bits(PARTS)


def test_digest_depends_on_every_part() -> None:
    changed = [{**PARTS, "weights": "abd"}, {**PARTS, "dtype": "float16"}, {"weights": "abc"}, {**PARTS, "x": ""}]
    assert len({fingerprint_digest(parts) for parts in [PARTS, *changed]}) == 5


def test_differences_in_words() -> None:
    assert fingerprint_differences(PARTS, dict(reversed(PARTS.items()))) == []
    other = {"weights": "abd", "dtype": "float32", "numba": "0.61"}
    assert fingerprint_differences(PARTS, other) == ["numba: absent against 0.61", "weights: abc against abd"]
