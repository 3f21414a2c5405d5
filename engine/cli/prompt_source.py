"""Where prompts come from: arguments, lines of standard input, rows of a JSONL file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sempre.ipc.errors import ConfigError

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt with its own parameters."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[Mapping[str, Any]] | None = None
    cache_salt: str | None = None
    priority: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters that override the flags."""
    where: str = ""
    """Position of the row, for errors."""


def prompts_from_arguments(arguments: Sequence[str], standard_input: Iterable[str]) -> list[PromptRow]:
    """Return one row per argument; `-` means the lines of standard input without empty ones."""
    rows = []
    for argument in arguments:
        if argument != "-":
            rows.append(PromptRow(prompt=_as_utf8(argument)))
            continue
        lines = (line.rstrip("\n") for line in standard_input)
        rows += [PromptRow(prompt=line) for line in lines if line]
    return rows


def prompts_from_file(path: str) -> list[PromptRow]:
    """Return the rows of a JSONL file, one object per line.

    A row has one of `prompt`, `prompt_token_ids` and `messages`, optionally `cache_salt` and `priority`, and any field
    of SamplingParams. Raises ConfigError naming the line, OSError if the file cannot be read.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line.strip():
            rows.append(_row(line, f"{path}:{number}"))
    return rows


def _as_utf8(argument: str) -> str:
    """Return an argument as typed: text here is UTF-8 in every locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument  # refused with its position when the prompt is encoded


def _row(line: bytes, where: str) -> PromptRow:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}", parameter="input", value=line) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {value!r}.", parameter="input", value=value)
    given = [key for key in _PROMPT_KEYS if key in value]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: expected exactly one of {', '.join(_PROMPT_KEYS)}, found {', '.join(given) or 'none'}.",
            parameter="input",
            value=value,
        )
    priority = value.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise ConfigError(f"{where}: priority must be an int, got {priority!r}.", parameter="priority", value=priority)
    taken = {key: value.pop(key) for key in (*given, "cache_salt", "priority") if key in value}
    return PromptRow(**taken, sampling=value, where=where)
