"""The form that a request wants its output to have: `response_format`, or `structured_outputs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sempre.engine.server.errors import BadRequest
from sempre.engine.server.requests import GenerationRequest, ResponseFormat
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
    given = {name: value for name, value in request.structured_outputs.items() if value is not None}
    try:
        return StructuredOutputsParams(**given)
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


def _of_format(given: ResponseFormat | None) -> StructuredOutputsParams | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    field = "response_format.json_schema"
    if given.json_schema is None:
        raise BadRequest(f"{field} must be provided: an object with a schema.", param=field)
    return StructuredOutputsParams(json=given.json_schema.schema)
