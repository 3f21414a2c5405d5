"""The list of cases that the plain run leaves out names tests that exist, and leaves others of their files in."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
LINES = [line for line in (TESTS / "product_cases.txt").read_text("utf-8").splitlines() if not line.startswith("#")]


def test_each_line_names_a_test() -> None:
    assert sorted(set(LINES)) == LINES
    for line in LINES:
        file, name = line.split("::")
        found = re.findall(
            r"^(?:async )?def (test_\w+)", (TESTS.parent / file).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert name.partition("[")[0] in found, line
        whole = {other.partition("::")[2] for other in LINES if other.startswith(f"{file}::")}
        assert set(found) - whole, f"no test of {file} is left"
