"""What the README says about the interface is true."""

from __future__ import annotations

from pathlib import Path

import pytest

from sempre.engine.server.neutral import NEUTRAL

README = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
WITHOUT_EFFECT = sorted({name for fields in NEUTRAL.values() for name, field in fields.items() if field.values is None})


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_every_field_without_effect_is_listed(name: str) -> None:
    start = README.index("Accepted and without effect")
    assert f"`{name}`" in README[start : start + 900]
