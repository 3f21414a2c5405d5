"""Structs that hold paths, as JSON: how a configuration travels to the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


def encode_json(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value, enc_hook=_encode_path)


def decode_json(data: bytes, kind: type[T]) -> T:
    """Raises msgspec.ValidationError naming the field that does not fit."""
    return msgspec.json.decode(data, type=kind, dec_hook=_decode_path)


def _encode_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} has no JSON form")
