"""Files of a checkpoint: a downloaded one may hold anything, so each is checked before it is opened, and bounded.

A FIFO would block forever, a device could be read forever, and deeply nested JSON would overflow the stack.
"""

from __future__ import annotations

import json
import os
import stat
from itertools import chain
from pathlib import Path
from reprlib import Repr

from sempre.ipc.errors import ModelError

MAX_CONFIG_BYTES = 64 * 2**20
"""of a file that describes others, such as config.json or the index of the weights"""
MAX_TOKENIZER_BYTES = 512 * 2**20
MAX_DEPTH = 32

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, 200, 200, 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 20


def shown(value: object) -> str:
    """Return the value for an error message, cut short."""
    return _REPR.repr(value)


def check_regular(path: Path, limit: int | None = None) -> int:
    """Return the size of a regular file, in bytes. Raises ModelError for anything else, and beyond `limit`."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: file not found; a checkpoint folder needs {path.name}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ModelError(f"{path}: expected a regular file, found {kind}.")
    if limit is not None and found.st_size > limit:
        raise ModelError(f"{path}: expected at most {limit} bytes, found {found.st_size}.")
    return found.st_size


def read_bytes(path: Path, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """Return what a regular file of at most `limit` bytes holds. Raises ModelError."""
    check_regular(path, limit)
    try:
        # Does not block should another kind of file have taken its place.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if len(data) > limit:
        raise ModelError(f"{path}: expected at most {limit} bytes, found more.")
    return data


def read_text(path: Path, limit: int = MAX_CONFIG_BYTES) -> str:
    """The same, as UTF-8 text."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: expected UTF-8 text, found {error}.") from error


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """Return the JSON object in a file of at most `limit` bytes. Raises ModelError naming the file."""
    value = _read_json(path, limit)
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_json_objects(path: Path) -> list[dict[str, object]]:
    """The same, for a list of objects."""
    value = _read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ModelError(f"{path}: expected a list of JSON objects, found {shown(value)}.")
    return value


def _read_json(path: Path, limit: int) -> object:
    try:
        value = json.loads(read_bytes(path, limit))
    # ValueError: no JSON, no UTF-8, or an integer of thousands of digits
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    except RecursionError:
        raise _too_deep(path) from None
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = list(chain.from_iterable(map(_parts, level)))
        if not level:
            return value
    raise _too_deep(path)


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep(path: Path) -> ModelError:
    return ModelError(f"{path}: expected at most {MAX_DEPTH} nested levels, found more.")
