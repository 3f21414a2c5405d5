"""Log lines with the request's id, as text or as JSON, of limited length."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

from sempre.engine.server.config import LogFormat, LogLevel
from sempre.ipc.log_lines import MOST_CHARS, PlainFormatter, plain

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request being served."""

# of one value, and of a line
_MOST_ITEMS = 2048
_MOST_LINE_CHARS = 65_536


class TextFormatter(PlainFormatter):
    """`time LEVEL [request id] message key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        request_id = REQUEST_ID.get()
        facts = "".join(f" {name}={_bounded(value)}" for name, value in getattr(record, "facts", {}).items())
        said = plain(record.getMessage()) + plain(facts, _MOST_LINE_CHARS)
        text = f"{stamp}Z {record.levelname}{f' [{request_id}]' if request_id else ''} {said}"
        return text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"


class JsonFormatter(PlainFormatter):
    """One object per line: time, level, logger, message, request_id, the facts, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": _bounded(record.getMessage()),
        }
        request_id = REQUEST_ID.get()
        if request_id:
            line["request_id"] = request_id
        facts = {name: _bounded(value) for name, value in getattr(record, "facts", {}).items()}
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps({**line, **facts}, ensure_ascii=False, default=str)
        if len(text) > 2 * _MOST_LINE_CHARS:
            text = json.dumps({**line, "left_out": sorted(facts)}, ensure_ascii=False)
        return text if text.isprintable() else "".join(map(_escaped, text))


def _bounded(value: object) -> object:
    """Return the value with its long parts cut."""
    match value:
        case str() if len(value) > MOST_CHARS:
            return f"{value[:MOST_CHARS]} … ({len(value)} characters)"
        case list() if len(value) > _MOST_ITEMS:
            return [*map(_bounded, value[:_MOST_ITEMS]), f"… ({len(value)} in all)"]
        case list():
            return [_bounded(item) for item in value]
        case dict():
            return {name: _bounded(item) for name, item in value.items()}
        case _:
            return value


def _escaped(character: str) -> str:
    # JSON is printable outside of strings, and inside every character may be written like this
    return character if character.isprintable() else json.dumps(character)[1:-1]


# below DEBUG, as in the library
_LEVELS = {"trace": 5}


def set_up_logging(log_format: LogFormat, *, debug: bool, uvicorn_level: LogLevel = "warning") -> None:
    """Send the logs of the project and of uvicorn to standard error, in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    project = logging.getLogger("sempre")
    project.handlers = [handler]
    project.setLevel(logging.DEBUG if debug else logging.INFO)
    project.propagate = False
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.handlers = [handler]
    uvicorn.setLevel(_LEVELS.get(uvicorn_level, uvicorn_level.upper()))
    uvicorn.propagate = False
    # logs of other libraries and asyncio, in the same format
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
