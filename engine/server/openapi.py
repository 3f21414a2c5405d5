"""The description of the interface at /openapi.json, made from the models that check and write the bodies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sempre.engine.server.errors import ErrorResponse
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from sempre.engine.server.responses import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)

_TEMPLATE = "#/components/schemas/"
_ERRORS = {
    400: "the request is refused; `param` names the field",
    401: "no key, or a wrong one",
    404: "no such model",
    413: "the body is too large",
    415: "the body is not JSON",
    500: "the engine failed",
    503: "starting, busy or shutting down; come again after Retry-After",
}


@dataclass(frozen=True)
class Operation:
    """One endpoint."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answer: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    streams: bool = False

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.path).strip("_")

    def schema(self) -> dict[str, Any]:
        """Return what FastAPI cannot know of the operation."""
        answer: dict[str, Any] = {} if self.answer is None else {"$ref": _TEMPLATE + self.answer.__name__}
        content = {self.media_type: {"schema": answer}}
        if self.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        found: dict[str, Any] = {"responses": {"200": {"description": "done", "content": content}}}
        parameters = re.findall(r"{(\w+)", self.path)
        if parameters:
            found["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
            ]
        expected = (401, 404, 500, 503) if parameters else (401, 500, 503)
        statuses = _ERRORS if self.body is not None else {status: _ERRORS[status] for status in expected}
        for status, text in statuses.items():
            error = {"schema": {"$ref": _TEMPLATE + ErrorResponse.__name__}}
            found["responses"][str(status)] = {"description": text, "content": {"application/json": error}}
        if self.body is not None:
            schema = {"schema": {"$ref": _TEMPLATE + self.body.__name__}}
            found["requestBody"] = {"required": True, "content": {"application/json": schema}}
        return found


OPERATIONS = (
    Operation("POST", "/v1/completions", "Complete prompts", CompletionRequest, CompletionResponse, streams=True),
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation",
        ChatCompletionRequest,
        ChatCompletionResponse,
        streams=True,
    ),
    Operation("GET", "/v1/models", "The model that is served", answer=ModelList),
    Operation("GET", "/v1/models/{model:path}", "One of its names", answer=ModelCard),
    Operation("POST", "/tokenize", "Text or messages to token ids", TokenizeRequest, TokenizeResponse),
    Operation("POST", "/detokenize", "Token ids to text", DetokenizeRequest, DetokenizeResponse),
    Operation("GET", "/health", "Whether every worker answers and steps go on"),
    Operation("GET", "/live", "Whether the server runs"),
    Operation("GET", "/ready", "Whether requests are accepted"),
    Operation("GET", "/metrics", "Figures in Prometheus's format", media_type="text/plain"),
    Operation("GET", "/version", "The server's version"),
    Operation("GET", "/load", "Requests in progress, and how full the KV cache is"),
    Operation("GET", "/server_info", "Settings in use, seconds of each start-up phase, fingerprint"),
)


def install(app: FastAPI) -> None:
    """Have `app` describe its bodies."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schema.setdefault("components", {})["schemas"] = _schemas()
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _schemas() -> dict[str, Any]:
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    _, requests = models_json_schema([(body, "validation") for body in bodies], ref_template=_TEMPLATE + "{model}")
    answers = [operation.answer for operation in OPERATIONS if operation.answer is not None]
    _, responses = msgspec.json.schema_components([*answers, ErrorResponse], ref_template=_TEMPLATE + "{name}")
    return {**requests["$defs"], **responses}
