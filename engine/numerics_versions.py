"""The numerics versions of releases: where the bits of a receipt can be made again.

A numerics version is the fingerprint's part `numerics`: the name of a device's kernels and a number. It rises when a
golden digest changes, and only then; CHANGELOG.md says why each did.
"""

from __future__ import annotations

from collections.abc import Mapping

from sempre.engine.fingerprint import fingerprint_bits, fingerprint_differences
from sempre.engine.version import __version__

RELEASES = {
    "cpu-fma-3": "0.1.0",
    "cuda-bf16-1": "0.1.0",
    "cuda-fp16-1": "0.1.0",
    "cuda-fp32-1": "0.1.0",
}
"""The last release with each numerics version."""
UNRELEASED = ("cpu-fma-1", "cpu-fma-2")
"""Versions from before the first release."""


def changed_bits(recorded: Mapping[str, str], current: Mapping[str, str], recorder: str | None = None) -> list[str]:
    """Return a phrase for each part that decides bits and is not as recorded, sorted by name.

    That of another numerics version also says which release computes as recorded. `recorder`: the one that recorded.
    """
    bits = fingerprint_bits(recorded)
    phrases = fingerprint_differences(bits, fingerprint_bits(current))
    if "numerics" not in bits:
        return phrases
    hint = reproduced_by(bits["numerics"], recorder)
    return [f"{phrase} ({hint})" if phrase.startswith("numerics: ") else phrase for phrase in phrases]


def reproduced_by(numerics: str, recorder: str | None = None, running: str = __version__) -> str:
    """Return which release computes with a numerics version, in words. `running`: the release that asks."""
    if numerics == "control":
        return "ordinary matmuls have no numerics version"
    if numerics in UNRELEASED:
        return "no release computes as recorded: it is older than the first"
    if numerics not in RELEASES:
        known = "" if recorder is None else f"; release {recorder} recorded it"
        return f"release {running} does not know it{known}"
    if RELEASES[numerics] == running:
        return "this release computes as recorded, with another device, dtype or setting of numerics"
    return f"release {RELEASES[numerics]} computes as recorded"
