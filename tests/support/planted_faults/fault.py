"""The description of a planted fault."""

from __future__ import annotations

from typing import NamedTuple

RANDOM_LIVES = "tests/invariance/test_fuzz.py::test_random_lives[plain]"
"""The fuzzer: among what it draws first are these faults' harms."""


class Fault(NamedTuple):
    """A change that a mistake could make, and the tests that notice it."""

    name: str
    harm: str
    """what goes wrong"""
    file: str
    """from the root of the project"""
    before: str
    """text that appears exactly once in the file"""
    after: str
    """its replacement"""
    killers: tuple[str, ...]
    """node ids of tests of the plain run that fail with the fault; without parameters: in one of its cases"""

    @property
    def changes_cpu_kernels(self) -> bool:
        """Whether the kernels of the CPU are compiled again."""
        return self.file.startswith("kernels/") and not self.file.rpartition("/")[2].startswith("gpu")
