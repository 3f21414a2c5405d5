"""A part of the fingerprint that is not as recorded is named, as is the release with the recorded numerics version."""

from __future__ import annotations

import pytest

from sempre.engine.numerics_versions import RELEASES, changed_bits, reproduced_by
from sempre.engine.version import __version__
from sempre.workers.fingerprint import CPU_PROFILE

THIS_RELEASE = "this release computes as recorded, with another device, dtype or setting of numerics"


def test_each_changed_part_is_named_and_another_numerics_version_also_by_its_release() -> None:
    recorded = {"numerics": "cpu-fma-2", "dtype": "float32", "engine": "0.0.9", "threads": "8"}
    current = {"numerics": "cpu-fma-3", "numba": "0.61", "dtype": "float32", "threads": "2"}
    assert changed_bits(recorded, current) == [
        "numba: absent against 0.61",
        "numerics: cpu-fma-2 against cpu-fma-3 (no release computes as recorded: it is older than the first)",
    ]
    assert changed_bits({**recorded, "numerics": "cpu-fma-9"}, {**current, "numba": "0.61"}, "0.7.0")[-1] == (
        f"numerics: cpu-fma-9 against cpu-fma-3 (release {__version__} does not know it; release 0.7.0 recorded it)"
    )


def test_equal_bits_need_no_release() -> None:
    recorded = {"numerics": "cpu-fma-2", "engine": "0.0.9", "threads": "8"}
    assert changed_bits(recorded, {"numerics": "cpu-fma-2", "threads": "2"}) == []
    assert changed_bits({"dtype": "float32"}, {"dtype": "float16"}) == ["dtype: float32 against float16"]


@pytest.mark.parametrize(
    ("numerics", "running", "hint"),
    [
        (CPU_PROFILE, "9.0.0", f"release {RELEASES[CPU_PROFILE]} computes as recorded"),
        (CPU_PROFILE, RELEASES[CPU_PROFILE], THIS_RELEASE),
        ("cpu-fma-1", "9.0.0", "no release computes as recorded: it is older than the first"),
        ("cpu-fma-99", "9.0.0", "release 9.0.0 does not know it"),
        ("control", "9.0.0", "ordinary matmuls have no numerics version"),
    ],
)
def test_the_release_of_a_numerics_version(numerics: str, running: str, hint: str) -> None:
    assert reproduced_by(numerics, running=running) == hint
