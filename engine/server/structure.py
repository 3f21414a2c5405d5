"""The form that a request wants its output to have: `response_format`, or `structured_outputs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sempre.engine.server.errors import BadRequest
from sempre.engine.server.requests import GenerationRequest
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.errors import ConfigError


def structured_outputs(request: GenerationRequest) -> StructuredOutputsParams | None:
    """Raises BadRequest, or ConfigError, naming the field."""
    of_format = _of_format(request.response_format)
    if request.structured_outputs is None:
        return of_format
    if of_format is not None:
        raise BadRequest(
            "response_format and structured_outputs both say what form the output has; give one.",
            param="structured_outputs",
        )
    try:
        return StructuredOutputsParams(**request.structured_outputs)
    except TypeError as error:
        text = str(error).replace("StructuredOutputsParams", "structured_outputs")
        raise BadRequest(text, param="structured_outputs") from None


@contextmanager
def blame_on(request: GenerationRequest) -> Iterator[None]:
    """Let a grammar that is refused be blamed on the field that it came from."""
    try:
        yield
    except ConfigError as error:
        named = error.parameter or ""
        if not named.startswith("structured_outputs") or request.structured_outputs is not None:
            raise
        field = "tools" if request.response_format is None else "response_format"
        raise BadRequest(str(error).replace(named, field, 1), param=field) from None


def _of_format(given: dict[str, Any] | None) -> StructuredOutputsParams | None:
    kind = None if given is None else given.get("type")
    match kind:
        case "text":
            _only(given, "type")
            return None
        case "json_object":
            _only(given, "type")
            return StructuredOutputsParams(json_object=True)
        case "json_schema":
            _only(given, "type", "json_schema")
            assert given is not None
            return StructuredOutputsParams(json=_schema(given.get("json_schema")))
    if given is None:
        return None
    raise BadRequest(
        f"response_format.type must be 'text', 'json_object' or 'json_schema', got {kind!r}.",
        param="response_format.type",
    )


def _only(given: dict[str, Any] | None, *known: str) -> None:
    for name in given or ():
        if name not in known:
            raise BadRequest(
                f"Unknown field 'response_format.{name}': it is not supported by this server.",
                param=f"response_format.{name}",
            )


def _schema(wrapper: object) -> dict[str, Any]:
    """The schema inside OpenAI's {name, description, strict, schema}; it is always kept strictly."""
    field = "response_format.json_schema"
    if not isinstance(wrapper, dict):
        raise BadRequest(f"{field} must be an object with name and schema, got {wrapper!r}.", param=field)
    for name in wrapper:
        if name not in ("name", "description", "strict", "schema"):
            raise BadRequest(f"Unknown field '{field}.{name}': it is not supported by this server.", param=field)
    schema = wrapper.get("schema")
    if not isinstance(schema, dict):
        raise BadRequest(f"{field}.schema must be a JSON schema, got {schema!r}.", param=f"{field}.schema")
    return schema
