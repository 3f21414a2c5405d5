"""The user's cache folder, a lock on an entry of it, and folders of models with another config.json."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.model_files import read_json_object


def cache_folder() -> Path:
    """Return the cache folder: `$SEMPRE_CACHE`, else `$XDG_CACHE_HOME/sempre`, else `~/.cache/sempre`.

    The folder is not created here. Raises ConfigError for a relative `SEMPRE_CACHE`, which would depend on the
    working directory.
    """
    own = os.environ.get("SEMPRE_CACHE")
    if own:
        path = Path(own).expanduser()
        if not path.is_absolute():
            raise ConfigError(
                f"SEMPRE_CACHE must be an absolute path, got {own!r}.", parameter="SEMPRE_CACHE", value=own
            )
        return path
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore a relative value.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "sempre"


def model_cache_folder(name: str) -> Path:
    """Return the folder of the pulled model `name`, which may not exist yet."""
    return cache_folder() / "models" / name


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock `<folder>.lock`; a second process waits here.

    The kernel frees the lock when its holder ends, however it ends, so locks never become stale.

    Raises ModelError if the folder is not writable.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: removing it would let two processes lock two files of the same name.
        handle = open(folder.with_name(folder.name + ".lock"), "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ModelError(
            f"the cache folder {folder.parent} cannot be written to: {error.strerror}. "
            "Set SEMPRE_CACHE to a writable folder."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def with_overrides(folder: Path, overrides: Mapping[str, Any]) -> Path:
    """Return a folder whose config.json includes `overrides`; objects are merged, everything else is replaced.

    Equal overrides of one folder give the same result folder. Raises ModelError if config.json is not an object or the
    cache folder is not writable.
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
                "Set SEMPRE_CACHE to a writable folder."
            ) from error
    return target


def _build(target: Path, config: str, others: list[Path]) -> None:
    """Create the folder atomically; another process may do the same."""
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
