"""A checkpoint that every engine reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sempre.ipc.gguf_index import GGUF_INDEX_FILE
from sempre.workers.gguf_source import open_gguf


def as_safetensors(folder: Path, scratch: Path) -> Path:
    """`folder`, or for a GGUF file a copy in `scratch` with its values rounded to the dtype of its config."""
    if not (folder / GGUF_INDEX_FILE).exists():
        return folder
    config = json.loads((folder / "config.json").read_text())
    dtype = getattr(torch, config["torch_dtype"])
    with open_gguf(folder) as source:
        tensors = {name: source.read(name).to(dtype).contiguous() for name in source.names()}
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    # the catalogue's only architecture; transformers wants its name too
    (scratch / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    for path in folder.glob("*.json"):
        if path.name not in ("config.json", GGUF_INDEX_FILE):
            shutil.copy(path, scratch)
    return scratch
