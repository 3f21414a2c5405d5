"""The changelog explains each numerics version, and the list of releases has those of this one."""

from __future__ import annotations

import re
from pathlib import Path

from sempre.engine.numerics_versions import RELEASES, UNRELEASED
from sempre.engine.version import __version__
from sempre.workers.fingerprint import CPU_PROFILE
from sempre.workers.gpu.fingerprint import PROFILES as GPU_PROFILES

CHANGELOG = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")


def test_this_release_is_the_last_one_with_its_numerics_versions() -> None:
    current = [CPU_PROFILE, *GPU_PROFILES.values()]
    assert sorted(numerics for numerics, release in RELEASES.items() if release == __version__) == sorted(current)
    assert f"## {__version__}\n" in CHANGELOG


def test_the_changelog_explains_each_numerics_version() -> None:
    rows = re.findall(r"^\| (`.*`) \| (.*) \| (.+) \|$", CHANGELOG, re.MULTILINE)
    explained = {name: release for names, release, _ in rows for name in re.findall("`([^`]*)`", names)}
    assert explained == {**RELEASES, **dict.fromkeys(UNRELEASED, "before 0.1.0")}
