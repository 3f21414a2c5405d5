"""`sempre list-models` prints the registry itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sempre.engine.cli.main import main
from sempre.ipc.errors import ModelError
from sempre.workers.models.registry import ENCODERS, FILES, parse_spec

CONFIG = json.loads((Path(__file__).parents[2] / "engine/checkpoints/tiny/config.json").read_text())


def refusal(architecture: str) -> str:
    """What is wrong with a config of this architecture; empty if nothing is."""
    try:
        parse_spec({**CONFIG, "architectures": [architecture]}, {})
    except ModelError as error:
        return str(error)
    return ""


def test_every_architecture_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["generate"] == list(FILES)
    assert {"tiny", "smollm2-135m"} <= set(found["names"])
    assert {"Qwen3Model", "Qwen3ForSequenceClassification"} <= set(found["pool"])
    assert main(["list-models"]) == 0
    text = capsys.readouterr().out.replace("\n  ", " ")
    assert all(name in text for name in [*FILES, *found["pool"], *(f"{name}…" for name in ENCODERS)])


def test_what_is_listed_is_what_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """A listed name is never an unknown architecture, whatever else its config lacks; a refused one always is."""
    assert main(["list-models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    unknown = [name for name in [*found["generate"], *found["pool"]] if "architectures" in refusal(name)]
    assert unknown == []
    [(reason, beginnings)] = found["refused"].items()
    assert all(f"an encoder: {reason}" in refusal(beginning + "Model") for beginning in beginnings)
