"""A model's folder with another config.json: links to its files, in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sempre.engine.models.cache import cache_folder
from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import read_json_object


def with_overrides(folder: Path, overrides: Mapping[str, Any]) -> Path:
    """Return a folder whose config.json has `overrides` in it; objects are merged, everything else is replaced.

    Equal overrides of one folder give the same place. Raises ModelError when config.json is no object, or the cache
    folder cannot be written to.
    """
    config = read_json_object(folder / "config.json")
    text = json.dumps(_merged(config, overrides), indent=2, ensure_ascii=False)
    others = sorted(path for path in folder.iterdir() if path.name != "config.json")
    name = hashlib.sha256("\0".join([text, *map(str, others)]).encode()).hexdigest()[:32]
    target = cache_folder() / "overrides" / name
    if not target.is_dir():
        try:
            _build(target, text, others)
        except OSError as error:
            raise ModelError(
                f"hf_overrides: the cache folder {target.parent} cannot be written to: {error.strerror}. "
                "Set SEMPRE_CACHE to a folder that can."
            ) from error
    return target


def _build(target: Path, config: str, others: list[Path]) -> None:
    """Whole or not at all; another process may do the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        (scratch / "config.json").write_text(config, encoding="utf-8")
        for path in others:
            (scratch / path.name).symlink_to(path.resolve())
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in overrides.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, dict) else value
    return merged
