"""Copies of the embedded model `tiny` that differ in one thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from sempre import engine

TINY = Path(engine.__file__).parent / "checkpoints" / "tiny"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_embeddings(folder: Path, rows: Mapping[int, float]) -> Path:
    """The embedding of each token in `rows` has this value in one place; logits are those of `tiny`."""
    tensors = load_file(TINY / "model.safetensors")
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    for token, value in rows.items():
        tensors[EMBEDDING][token, 5] = value
    _copy(folder, {"tie_word_embeddings": False})
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_window(folder: Path, window: int) -> Path:
    """A row sees the last `window` keys only."""
    _copy(
        folder,
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window},
    )
    return folder


def _copy(folder: Path, changes: Mapping[str, object]) -> None:
    shutil.copytree(TINY, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
