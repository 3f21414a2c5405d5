"""The user's cache folder, and a lock that serialises work on one entry of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sempre.ipc.errors import ConfigError, ModelError


def cache_folder() -> Path:
    """Return the cache folder: `$SEMPRE_CACHE`, else `$XDG_CACHE_HOME/sempre`, else `~/.cache/sempre`.

    The folder is not created here. Raises ConfigError for a relative `SEMPRE_CACHE`: it would name another
    folder in every working directory.
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
    # The XDG base directory specification tells readers to ignore a relative value.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "sempre"


def model_cache_folder(name: str) -> Path:
    """Return the folder of the pulled model `name`, which may not exist yet."""
    return cache_folder() / "models" / name


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder` (`<folder>.lock`); a second process waits here.

    The kernel frees the lock when its holder ends, however it ends, so no stale lock can remain.

    Raises ModelError when the folder cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: removing it would let two processes hold locks on two files of one name.
        handle = open(folder.with_name(folder.name + ".lock"), "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ModelError(
            f"the cache folder {folder.parent} cannot be written to: {error.strerror}. "
            "Set SEMPRE_CACHE to a folder that can."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
