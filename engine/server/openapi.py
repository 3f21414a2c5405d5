"""The API description at /openapi.json, made from the types that check and write the bodies."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import msgspec

from sempre.engine.server.agents.messages_output import MessagesResponse, TokenCount
from sempre.engine.server.agents.messages_requests import CountTokensRequest, MessagesRequest
from sempre.engine.server.agents.responses_output import ResponsesResponse
from sempre.engine.server.agents.responses_requests import ResponsesRequest
from sempre.engine.server.errors import MESSAGES_PATH, ErrorResponse, MessagesErrorResponse
from sempre.engine.server.neutral import NEUTRAL, Neutral
from sempre.engine.server.pooling_requests import (
    ClassificationRequest,
    ClassificationResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    PoolingRequest,
    PoolingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from sempre.engine.server.responses import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from sempre.engine.version import __version__

_TEMPLATE = "#/components/schemas/"
_ERRORS = {
    400: "the request is refused; `param` names the field",
    401: "no key, or a wrong one",
    404: "no such model",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the API key has used what it may for now; retry after Retry-After",
    500: "the engine failed",
    503: "starting, busy or shutting down; retry after Retry-After",
}


@dataclass(frozen=True)
class Operation:
    """One endpoint."""

    method: str
    path: str
    summary: str
    bodies: tuple[type[msgspec.Struct], ...] = ()
    """any of these"""
    answers: tuple[type[msgspec.Struct], ...] = ()
    media_type: str = "application/json"
    streams: bool = False

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.path).strip("_")

    def schema(self) -> dict[str, Any]:
        """Return the operation object."""
        content = {self.media_type: {"schema": _one_of(self.answers)}}
        if self.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        found: dict[str, Any] = {"summary": self.summary, "operationId": f"{self.name}_{self.method.lower()}"}
        found["responses"] = {"200": {"description": "done", "content": content}}
        parameters = re.findall(r"{(\w+)", self.path)
        if parameters:
            found["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
            ]
        expected = (401, 404, 500, 503) if parameters else (401, 500, 503)
        statuses = _ERRORS if self.bodies else {status: _ERRORS[status] for status in expected}
        for status, text in statuses.items():
            form = MessagesErrorResponse if self.path.startswith(MESSAGES_PATH) else ErrorResponse
            error = {"schema": {"$ref": _TEMPLATE + form.__name__}}
            found["responses"][str(status)] = {"description": text, "content": {"application/json": error}}
        if self.bodies:
            schema = {"schema": _one_of(self.bodies)}
            found["requestBody"] = {"required": True, "content": {"application/json": schema}}
        return found


def _one_of(models: tuple[type[msgspec.Struct], ...]) -> dict[str, Any]:
    references = [{"$ref": _TEMPLATE + model.__name__} for model in models]
    return {"anyOf": references} if len(references) > 1 else references[0] if references else {}


OPERATIONS = (
    Operation("POST", "/v1/completions", "Complete prompts", (CompletionRequest,), (CompletionResponse,), streams=True),
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation",
        (ChatCompletionRequest,),
        (ChatCompletionResponse,),
        streams=True,
    ),
    Operation(
        "POST",
        "/v1/responses",
        "Answer a conversation of items; stores nothing",
        (ResponsesRequest,),
        (ResponsesResponse,),
        streams=True,
    ),
    Operation(
        "POST",
        "/v1/messages",
        "Answer a conversation, for Anthropic's clients",
        (MessagesRequest,),
        (MessagesResponse,),
        streams=True,
    ),
    Operation(
        "POST", "/v1/messages/count_tokens", "Count a conversation's tokens", (CountTokensRequest,), (TokenCount,)
    ),
    Operation(
        "POST",
        "/invocations",
        "Chat or completion, depending on messages or prompt; for SageMaker",
        (ChatCompletionRequest, CompletionRequest),
        (ChatCompletionResponse, CompletionResponse),
        streams=True,
    ),
    Operation("POST", "/v1/embeddings", "Vectors of prompts", (EmbeddingRequest,), (EmbeddingResponse,)),
    Operation("POST", "/pooling", "What the model pools of prompts", (PoolingRequest,), (PoolingResponse,)),
    Operation("POST", "/classify", "Probabilities of labels", (ClassificationRequest,), (ClassificationResponse,)),
    *(
        Operation("POST", path, "How well documents answer queries", (ScoreRequest,), (ScoreResponse,))
        for path in ("/score", "/v1/score")
    ),
    *(
        Operation("POST", path, "Documents in the order of relevance", (RerankRequest,), (RerankResponse,))
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    Operation(
        "POST", "/v1/load_lora_adapter", "Serve one more adapter", (LoadAdapterRequest,), media_type="text/plain"
    ),
    Operation("POST", "/v1/unload_lora_adapter", "Forget an adapter", (UnloadAdapterRequest,), media_type="text/plain"),
    Operation("POST", "/sleep", "Give back memory until /wake_up; with --enable-sleep-mode"),
    Operation("POST", "/wake_up", "Take back memory, and compute what has waited"),
    Operation("GET", "/is_sleeping", "Whether the engine sleeps, at any level"),
    Operation("POST", "/pause", "Compute nothing until /resume; with --enable-sleep-mode"),
    Operation("POST", "/resume", "Compute again"),
    Operation("GET", "/is_paused", "Whether nothing is computed, asleep or paused"),
    Operation("GET", "/v1/models", "The served model, and its adapters", answers=(ModelList,)),
    Operation("GET", "/v1/models/{model:path}", "The served model or adapter of this name", answers=(ModelCard,)),
    Operation("POST", "/tokenize", "Text or messages to token ids", (TokenizeRequest,), (TokenizeResponse,)),
    Operation("POST", "/detokenize", "Token ids to text", (DetokenizeRequest,), (DetokenizeResponse,)),
    Operation("GET", "/tokenizer_info", "The model's tokenizer_config.json and the chat template in use"),
    Operation("GET", "/health", "Whether every worker responds and steps make progress"),
    Operation("GET", "/ping", "Like /health, and 503 while the engine starts; for SageMaker"),
    Operation("POST", "/ping", "The same"),
    Operation("GET", "/live", "Whether the server runs"),
    Operation("GET", "/ready", "Whether requests are accepted"),
    Operation("GET", "/metrics", "Metrics in Prometheus's format", media_type="text/plain"),
    Operation("GET", "/version", "The server's version"),
    Operation("GET", "/load", "Requests in progress, and how full the KV cache is"),
    Operation("GET", "/server_info", "Settings in use, seconds of each start-up phase, fingerprint"),
    Operation("GET", "/debug/ranks", "Each worker's step, digest, memory and, if it lags, stack"),
)


def description(root_path: str = "", *, open_paths: Set[str] | None = None) -> dict[str, Any]:
    """Return the whole description; `root_path` is where a proxy serves this server, `open_paths` are those that need
    no API key; None: nothing does."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        path = re.sub(r":\w+}", "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = schema = operation.schema()
        if open_paths is not None and path not in open_paths:
            schema["security"] = [{"key": []}]
    found: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "Sempre", "version": __version__}}
    if root_path:
        found["servers"] = [{"url": root_path}]
    components: dict[str, Any] = {"schemas": _schemas()}
    if open_paths is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {**found, "paths": paths, "components": components}


def _schemas() -> dict[str, Any]:
    # without duplicates, in order
    bodies = list(dict.fromkeys(body for operation in OPERATIONS for body in operation.bodies))
    answers = list(dict.fromkeys(answer for operation in OPERATIONS for answer in operation.answers))
    _, schemas = msgspec.json.schema_components(
        [*bodies, *answers, ErrorResponse, MessagesErrorResponse], ref_template=_TEMPLATE + "{name}"
    )
    for body, neutral in NEUTRAL.items():
        schema = schemas[body.__name__]
        schema["properties"].update({name: _neutral(field) for name, field in neutral.items()})
        schema["additionalProperties"] = False
    for name in _parts(bodies, schemas):
        schema = schemas[name]
        for field, found in schema["properties"].items():
            if field not in schema.get("required", ()):
                schema["properties"][field] = _nullable(found)
    return schemas


def _parts(bodies: list[type[msgspec.Struct]], schemas: dict[str, Any]) -> set[str]:
    """The names of the schemas used by requests."""
    names = {body.__name__ for body in bodies}
    while True:
        text = msgspec.json.encode([schemas[name] for name in sorted(names)]).decode()
        found = names | set(re.findall(re.escape(_TEMPLATE) + r"(\w+)", text))
        if found == names:
            return names
        names = found


def _neutral(field: Neutral) -> dict[str, Any]:
    schema = msgspec.json.schema(field.kind)
    if field.values is not None:
        schema = {"enum": list(field.values)} if field.values else {"type": "null"}
    return {**schema, "description": "accepted, without effect"}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may also be null, which means left out."""
    if {"type": "null"} in schema.get("anyOf", ()) or schema.get("type") == "null":
        return schema
    annotations: dict[str, Any] = {name: schema[name] for name in ("description", "default") if name in schema}
    inner = {name: value for name, value in schema.items() if name not in annotations}
    return {"anyOf": [inner, {"type": "null"}], **annotations}
