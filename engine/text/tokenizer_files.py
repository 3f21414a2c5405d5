"""Reads the files next to tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import read_json_object, shown

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens with a role, in the order of transformers."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`, or {} if the file is missing."""
    return read_json_object(path) if path.exists() else {}


def named_tokens(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return the special tokens of tokenizer_config.json by name; each is a string or an object with `content`."""
    tokens = {}
    for name in NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{folder / 'tokenizer_config.json'}: {name} must be a string, found {shown(value)}.")
        if value is not None:
            tokens[name] = value
    return tokens


def eos_token_ids(folder: Path) -> list[int]:
    """Return the end tokens of generation_config.json or, if it has none, of config.json."""
    value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = read_json(folder / "config.json").get("eos_token_id")
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise ModelError(f"{folder}: eos_token_id must be a token id or a list of them, found {shown(value)}.")
    return ids
