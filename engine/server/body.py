"""From the bytes of a request to a checked model, with OpenAI's error where they are none."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError, BadRequest

Model = TypeVar("Model", bound=BaseModel)


async def read_model(request: Request, model: type[Model], config: ServerConfig) -> Model:
    """Read and check the body. Raises APIError: 400, 413 or 415."""
    return parse_model(await _read(request, config.max_body_bytes), model, ignore_unknown=config.ignore_unknown_fields)


def parse_model(data: bytes, model: type[Model], *, ignore_unknown: bool = False) -> Model:
    """Return `data` as `model`. Raises BadRequest naming the field that does not fit."""
    try:
        return model.model_validate_json(data, extra="ignore" if ignore_unknown else None)
    except ValidationError as error:
        raise _refusal(error, model) from None


async def _read(request: Request, limit: int) -> bytes:
    # A web page may send other types to any server without asking the browser first.
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"Content-Type must be application/json, got {kind!r}.")
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


def _refusal(error: ValidationError, model: type[BaseModel]) -> BadRequest:
    problems: list[Any] = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    location = first["loc"]
    if not location:
        return BadRequest(f"The body must be a JSON object: {first['msg']}.")
    field = str(location[0])
    if first["type"] == "extra_forbidden":
        path = ".".join(map(str, location))
        near = difflib.get_close_matches(path, model.model_fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return BadRequest(f"Unknown field {path!r}: it is not supported by this server.{hint}", param=path)
    # A field that may be of several types has a problem with each of them.
    texts = [problem["msg"] for problem in problems if problem["loc"][0] == field]
    path = field if len(texts) > 1 else ".".join(map(str, location))
    return BadRequest(f"{path}: {'; or '.join(dict.fromkeys(texts))}.", param=path)
