"""From the bytes of a request to a checked model, or OpenAI's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from sempre.engine.server.errors import APIError, BadRequest
from sempre.engine.server.fields import to_model
from sempre.engine.server.limits import MAX_VALUES, check_sizes, check_structure
from sempre.engine.server.prompts import client_of
from sempre.engine.server.service import Service

Model = TypeVar("Model", bound=msgspec.Struct)
Result = TypeVar("Result")

# ten thousand lists, at worst
_SHORT_BYTES = 32 * 1024


async def read_model(request: Request, model: type[Model], service: Service) -> Model:
    """Return the checked body, parsed off the event loop if it is long. Raises APIError: 400, 413 or 503."""
    state = request.state
    if not hasattr(state, "body"):
        state.body = await read_plain(request, service)

    def checked() -> Model:
        found = to_model(state.body, model, ignore_unknown=service.config.ignore_unknown_fields)
        check_sizes(found)
        return found

    try:
        return await beside_the_loop(request, service, checked)
    finally:
        # generation may take long and does not need the body
        del state.body


async def read_plain(request: Request, service: Service) -> Any:
    """Return the body as plain JSON; put into `request.state.body`, `read_model` uses it. Raises the same errors."""
    data = await read_body(request, service.config.max_body_bytes)
    request.state.body_bytes = len(data)
    return await beside_the_loop(request, service, lambda: parse(data, service.max_json_values))


async def beside_the_loop(request: Request, service: Service, read: Callable[[], Result]) -> Result:
    """Return `read()`, which parses or converts the body, off the event loop if the body is long. Raises its errors."""
    if request.state.body_bytes <= _SHORT_BYTES:
        return read()
    # the parser holds the GIL only briefly, and Python code shares it with the loop
    return await service.offload.in_thread(client_of(request), read)


def parse_model(
    data: bytes, model: type[Model], *, ignore_unknown: bool = False, max_values: int = MAX_VALUES
) -> Model:
    """Return `data` as `model`. Raises BadRequest naming the invalid field."""
    return to_model(parse(data, max_values), model, ignore_unknown=ignore_unknown)


def parse(data: bytes, max_values: int = MAX_VALUES) -> Any:
    """Return `data` as plain JSON. Raises BadRequest, or APIError (413) for too many values."""
    check_structure(data, max_values)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body must be a JSON object: {error}.") from None


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body. Raises APIError: 400, or 413 for more than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except ClientDisconnect:
        raise BadRequest("The connection was closed before the whole body had arrived.") from None
    return b"".join(parts)


def _too_large(limit: int) -> APIError:
    return APIError(413, f"The body must not exceed {limit} bytes (--max-body-bytes).", headers={"Connection": "close"})
