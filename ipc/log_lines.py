"""Untrusted text in logs and on terminals: one line stays one line, and no character has any effect.

Paths, headers, fields of frames and messages of other processes end up in log lines. A line feed would forge a line, an
escape sequence would control the reader's terminal, a bidirectional mark would reorder the text. Every handler of the
project's processes uses a formatter of this module.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import TextIO

MOST_CHARS = 8192
_MOST_TRACEBACK_CHARS = 65_536
_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def plain(text: str, limit: int = MOST_CHARS) -> str:
    """Return `text` on one line of printable characters, cut to about `limit` of them; others as \\x1b or \\u2028."""
    cut = text if len(text) <= limit else f"{text[:limit]} … ({len(text)} characters)"
    return cut if cut.isprintable() else "".join(map(_shown, cut))


def plain_lines(text: str, limit: int = _MOST_TRACEBACK_CHARS) -> str:
    """Return a text of several lines with each line plain and indented, so that none looks like a new log line.

    A long text keeps its end, where a traceback says what happened.
    """
    kept = text if len(text) <= limit else f"… ({len(text)} characters)\n{text[-limit:]}"
    return "\n".join(f"  {plain(line)}" for line in kept.split("\n"))


def for_terminal(text: str, stream: TextIO) -> str:
    """Return what a model wrote, for `stream`: unchanged, except without control characters on a terminal."""
    if text.isprintable() or not stream.isatty():
        return text
    return "".join(c if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f") else _shown(c) for c in text)


class PlainFormatter(logging.Formatter):
    """A `logging` formatter for untrusted messages."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        record.message = plain(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _ExceptionInfo) -> str:
        """Return the traceback, indented."""
        return plain_lines(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        """Return the stack, indented."""
        return plain_lines(stack_info)


def set_up_process_log(name: str) -> None:
    """Log warnings of this process to standard error, as `name`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter(f"{name}: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
