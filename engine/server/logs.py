"""Log lines with the id of the request they are about, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

from sempre.engine.server.config import LogFormat, LogLevel

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request being served."""


class TextFormatter(logging.Formatter):
    """`time LEVEL [request id] message key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        request_id = REQUEST_ID.get()
        facts = "".join(f" {name}={value}" for name, value in getattr(record, "facts", {}).items())
        text = f"{stamp}Z {record.levelname}{f' [{request_id}]' if request_id else ''} {record.getMessage()}{facts}"
        return text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, message, request_id, the facts, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id:
            line["request_id"] = request_id
        line.update(getattr(record, "facts", {}))
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


# below DEBUG, as the library has it
_LEVELS = {"trace": 5}


def set_up_logging(log_format: LogFormat, *, debug: bool, uvicorn_level: LogLevel = "warning") -> None:
    """Send the logs of the project and of uvicorn to standard error, in one form."""
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
