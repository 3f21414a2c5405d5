"""Copies of the embedded model `tiny` that pool: they embed, classify or rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_variants import TINY

# sentence-transformers' flags by our kinds
FLAGS = {"LAST": "lasttoken", "MEAN": "mean_tokens", "CLS": "cls_token"}
YES, NO = 300, 200


def embedder(folder: Path, kind: str = "LAST", *, normalizes: bool = True, **config: Any) -> Path:
    """With the files of sentence-transformers."""
    copy_of_tiny(folder, config)
    write_pooling(folder, {f"pooling_mode_{flag}": name == kind for name, flag in FLAGS.items()}, normalizes=normalizes)
    return folder


def write_pooling(folder: Path, flags: Mapping[str, object], *, normalizes: bool = True) -> None:
    types = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    write_modules(folder, types)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": size, **flags}))


def write_modules(folder: Path, types: Sequence[str]) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(types)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def classifier(folder: Path, labels: Sequence[str] = ("no", "maybe", "yes"), **config: Any) -> Path:
    """With a score head of random weights."""
    architecture = json.loads((TINY / "config.json").read_text())["architectures"][0]
    named = {str(index): label for index, label in enumerate(labels)}
    changes = {"architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")], "id2label": named}
    copy_of_tiny(folder, changes | config)
    tensors = load_file(TINY / "model.safetensors")
    size = tensors["model.norm.weight"].shape[0]
    generator = torch.Generator().manual_seed(len(labels))
    tensors["score.weight"] = torch.randn(len(labels), size, generator=generator) * 0.02
    save_file(tensors, folder / "model.safetensors")
    return folder


def reranker(folder: Path, **config: Any) -> Path:
    """Whose score is that of the token YES against NO."""
    copy_of_tiny(folder, config)
    write_modules(folder, ["Transformer", "LogitScore"])
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": YES, "false_token_id": NO}))
    return folder


def copy_of_tiny(folder: Path, changes: Mapping[str, object]) -> None:
    shutil.copytree(TINY, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
