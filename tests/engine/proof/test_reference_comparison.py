"""Every module is beside that of transformers; one changed weight is named as the place where they part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sempre.engine.cli.main import main

FLAGS = ["--num-threads", "1", "--dtype", "float32"]
TINY = Path(__file__).parents[3] / "engine" / "checkpoints" / "tiny"
NAME = "model.layers.2.mlp.down_proj"


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["bisect", *map(str, arguments), "--json", *FLAGS])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.product
def test_modules_are_those_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare(capsys, "tiny", "transformers")
    assert (code, found["verdict"], found["first_far"]) == (0, "close", None), found["first_far"]
    paths = [each["path"] for each in found["operations"]]
    for name in (
        "embed_tokens",
        "layers.0.input_layernorm",
        "layers.5.self_attn.qkv_proj",
        "layers.5.mlp.down_proj",
        "norm",
    ):
        assert f"model.{name}" in paths
    assert paths[-1] == "logits"
    assert found["operations"][0]["ulps"] == 0, "the embedding is a copy"
    assert len(paths) >= 6 * 5 + 3
    changed = shutil.copytree(TINY, tmp_path / "changed")
    tensors = load_file(TINY / "model.safetensors")
    tensors[f"{NAME}.weight"][3] += torch.tensor(0.5, dtype=torch.bfloat16)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    code, found = compare(capsys, "tiny", f"transformers:{changed}")
    assert code == 5
    assert found["first_far"].startswith(f"{NAME} (")
    assert "element 3 is" in found["first_far"]


@pytest.mark.parametrize("arguments", [["transformers", "{}"], ["transformers", "transformers"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", *arguments]) == 2
    assert "one of the sides must be a model, the other transformers" in capsys.readouterr().err


@pytest.mark.product
def test_a_folder_that_transformers_cannot_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", "tiny", f"transformers:{tmp_path}", *FLAGS]) != 0
    assert "transformers cannot load it" in capsys.readouterr().err
