"""The digest depends on every part and on nothing else."""

from __future__ import annotations

from sempre.engine.fingerprint import fingerprint_digest, fingerprint_parts
from sempre.engine.version import __version__

PARTS = {"weights": "abc", "dtype": "float32"}


def test_parts_are_sorted_and_name_the_engine() -> None:
    assert list(fingerprint_parts(PARTS).items()) == [
        ("dtype", "float32"),
        ("engine", __version__),
        ("weights", "abc"),
    ]


def test_digest_is_stable() -> None:
    # A change of this value changes every user's recorded fingerprints.
    assert fingerprint_digest(PARTS) == "ecde28cf72a9155c"
    assert fingerprint_digest(dict(reversed(PARTS.items()))) == fingerprint_digest(PARTS)


def test_digest_depends_on_every_part() -> None:
    changed = [{**PARTS, "weights": "abd"}, {**PARTS, "dtype": "float16"}, {"weights": "abc"}, {**PARTS, "x": ""}]
    assert len({fingerprint_digest(parts) for parts in [PARTS, *changed]}) == 5
