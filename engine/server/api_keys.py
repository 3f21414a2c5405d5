"""The keys that clients may use, and what each of them allows.

A line of the file is a key, then settings of it, if any: `KEY name=alice weight=2 requests_per_minute=60`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from sempre.engine.near_names import near_name
from sempre.engine.server.config import ServerConfig
from sempre.ipc.errors import ConfigError

_Weight = Annotated[int, Meta(ge=1, le=1000)]
_Limit = Annotated[int, Meta(ge=0, le=2**53)]


class ApiKey(Struct, frozen=True, kw_only=True):
    """A key. A limit of 0 is none; `weight` is its share of the engine beside those of the other keys."""

    secret: str
    name: str
    weight: _Weight = 1
    max_sequences: _Limit = 0
    requests_per_minute: _Limit = 0
    tokens_per_minute: _Limit = 0


class _Line(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a line of the file may set; the server's settings are the defaults."""

    name: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    weight: _Weight | None = None
    max_sequences: _Limit | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None


def api_keys(config: ServerConfig) -> list[ApiKey]:
    """Return the keys of the configuration, then those of its file.

    Raises ConfigError for a file without keys or with a wrong line, two keys of one name, and limits without a key.
    """
    keys = [_key(config, index, secret, _Line()) for index, secret in enumerate(config.api_key)]
    if config.api_key_file is not None:
        lines = list(_lines(Path(config.api_key_file)))
        keys += [_key(config, len(keys) + index, secret, line) for index, (secret, line) in enumerate(lines)]
    for what in ("secret", "name"):
        values = [getattr(key, what) for key in keys]
        for index, value in enumerate(values):
            if value in values[:index]:
                shown = "the same key" if what == "secret" else f"the name {value!r}"
                raise ConfigError(
                    f"api_key: keys {values.index(value) + 1} and {index + 1} have {shown}; each must differ.",
                    parameter="api_key",
                )
    limits = ("max_sequences_per_key", "requests_per_minute", "tokens_per_minute")
    for name in limits if not keys else ():
        if getattr(config, name):
            raise ConfigError(f"{name} limits each API key: give api_key or api_key_file.", parameter=name)
    return keys


def _key(config: ServerConfig, index: int, secret: str, line: _Line) -> ApiKey:
    return ApiKey(
        secret=secret,
        name=line.name or f"key-{index + 1}",
        weight=line.weight or 1,
        max_sequences=config.max_sequences_per_key if line.max_sequences is None else line.max_sequences,
        requests_per_minute=_given(line.requests_per_minute, config.requests_per_minute),
        tokens_per_minute=_given(line.tokens_per_minute, config.tokens_per_minute),
    )


def _given(own: int | None, default: int) -> int:
    return default if own is None else own


def _lines(path: Path) -> Iterator[tuple[str, _Line]]:
    """Yield each key of the file with its settings; errors never show a key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error.strerror}.", parameter="api_key_file") from error
    found = False
    for number, line in enumerate(lines, 1):
        secret, *settings = line.split() or [""]
        if secret:
            found = True
            yield secret, _settings(f"api_key_file {path}, line {number}", settings)
    if not found:
        raise ConfigError(f"api_key_file {path} holds no key.", parameter="api_key_file")


def _settings(where: str, settings: list[str]) -> _Line:
    pairs = [setting.partition("=") for setting in settings]
    names = _Line.__struct_fields__
    for name, is_set, _ in pairs:
        if not is_set or name not in names:
            near = near_name(name, names)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(
                f"{where}: expected setting=value after the key, with a setting of {', '.join(names)}.{hint}",
                parameter="api_key_file",
            )
    try:
        return msgspec.convert({name: value for name, _, value in pairs}, _Line, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.", parameter="api_key_file") from None
