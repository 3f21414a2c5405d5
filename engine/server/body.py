"""From the bytes of a request to a checked model, with OpenAI's error where they are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from sempre.engine.server.errors import APIError, BadRequest
from sempre.engine.server.fields import to_model
from sempre.engine.server.json_scan import MAX_VALUES, check_structure
from sempre.engine.server.limits import check_sizes
from sempre.engine.server.prompts import client_of
from sempre.engine.server.service import Service

Model = TypeVar("Model", bound=msgspec.Struct)
Result = TypeVar("Result")

# ten thousand lists, at worst
_SHORT_BYTES = 32 * 1024


async def read_model(request: Request, model: type[Model], service: Service) -> Model:
    """Read and check the body, a long one away from the event loop. Raises APIError: 400, 413 or 503."""
    config = service.config
    data = await read_body(request, config.max_body_bytes)
    request.state.body_bytes = len(data)

    def parsed() -> Model:
        most = service.max_json_values
        found = parse_model(data, model, ignore_unknown=config.ignore_unknown_fields, max_values=most)
        check_sizes(found)
        return found

    return await beside_the_loop(request, service, data, parsed)


async def beside_the_loop(request: Request, service: Service, data: bytes, read: Callable[[], Result]) -> Result:
    """Return `read()`, which reads `data`: away from the event loop where that is long. Raises what it raises."""
    if len(data) <= _SHORT_BYTES:
        return read()
    # the parser's turns are short, and what Python code does is done in turns with the loop
    return await service.offload.in_thread(client_of(request), read)


def parse_model(
    data: bytes, model: type[Model], *, ignore_unknown: bool = False, max_values: int = MAX_VALUES
) -> Model:
    """Return `data` as `model`. Raises BadRequest naming the field that does not fit."""
    check_structure(data, max_values)
    try:
        plain = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body must be a JSON object: {error}.") from None
    return to_model(plain, model, ignore_unknown=ignore_unknown)


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
        raise BadRequest("The connection was closed before the whole body had come.") from None
    return b"".join(parts)


def _too_large(limit: int) -> APIError:
    return APIError(413, f"The body must not exceed {limit} bytes (--max-body-bytes).", headers={"Connection": "close"})
