"""constraints.txt has one version of everything that is installed, as when the golden digests were recorded."""

from __future__ import annotations

from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: Version(version) for name, version in pairs}


def declared() -> list[Requirement]:
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line.strip() for line in config["options"]["install_requires"].splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def needed(requirements: list[Requirement]) -> set[str]:
    """Names of these and all that they need, as installed here."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, distribution(name).requires or [])
    return found


def test_every_requirement_has_a_version_that_it_allows() -> None:
    versions = pinned()
    for requirement in declared():
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_nothing_that_is_installed_is_left_out() -> None:
    missing = {name for name in needed(declared()) - set(pinned()) if not name.startswith(("nvidia-", "cuda-"))}
    # a GPU's torch brings its own compiler and libraries
    assert missing <= {"triton"}
