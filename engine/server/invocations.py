"""/invocations, as SageMaker calls a model: what its body holds tells a chat from a completion."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from sempre.engine.server.body import beside_the_loop, read_body
from sempre.engine.server.chat import create_chat_completion
from sempre.engine.server.completions import create_completion
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.json_scan import check_structure
from sempre.engine.server.service import Service

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def invoke(service: Service, http: Request) -> Response:
    """Answer as the endpoint does whose body this is. Raises what the endpoint raises."""
    data = await read_body(http, service.config.max_body_bytes)
    names = await beside_the_loop(http, service, data, lambda: _names(data, service.max_json_values))
    if "messages" in names:
        endpoint = create_chat_completion
    elif "prompt" in names:
        endpoint = create_completion
    else:
        raise BadRequest("The body must hold messages, as for /v1/chat/completions, or prompt, as for /v1/completions.")
    return await endpoint(service, Request(http.scope, _again(data, http.receive)))


def _names(data: bytes, max_values: int) -> Iterable[str]:
    check_structure(data, max_values)
    try:
        return _MEMBERS.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body must be a JSON object: {error}.") from None


def _again(data: bytes, receive: Receive) -> Receive:
    """Give a body that has been read once more, then what still comes."""
    waiting = [data]

    async def received() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return received
