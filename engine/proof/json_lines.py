"""Files of JSON lines, read so that a bad line has its own error and the others are still judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sempre.ipc.errors import RecordError

MAX_LINE_BYTES = 256 * 2**20


class JsonLine(NamedTuple):
    """One line of a file: its JSON object, or what is wrong with it."""

    number: int
    """from 1"""
    text: bytes
    """without the line feed"""
    value: dict[str, Any]
    """empty if there is an error"""
    error: RecordError | None
    is_whole: bool = True
    """not the last line of a file, torn or still being written"""


def read_json_lines(path: Path, offset: int = 0, number: int = 0) -> Iterator[JsonLine]:
    """Yield the lines that are not empty, from the byte `offset` on, before which there are `number` lines.

    Raises RecordError if the file cannot be read or has an endless line.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while text := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    raise line_error(path, number, f"expected at most {MAX_LINE_BYTES} bytes, found more")
                if text.strip():
                    yield _parsed(path, number, text)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}.", path=str(path)) from error


def line_error(path: Path, number: int, what: str) -> RecordError:
    """Return the error for one line."""
    return RecordError(f"{path}, line {number}: {what}.", path=str(path), line=number)


def _parsed(path: Path, number: int, text: bytes) -> JsonLine:
    def bad(what: str) -> JsonLine:
        return JsonLine(number, text, {}, line_error(path, number, what), is_whole)

    is_whole = text.endswith(b"\n")
    if not is_whole:
        return bad("the last line is torn: expected a line feed at its end, found the end of the file")
    text = text[:-1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return bad(f"expected a JSON object, found text that is not JSON ({error})")
    if not isinstance(value, dict):
        return bad(f"expected a JSON object, found {type(value).__name__}")
    return JsonLine(number, text, value, None)
