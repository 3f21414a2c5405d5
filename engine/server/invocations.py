"""/invocations, as SageMaker calls a model: what its body holds tells a chat from a completion."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.server.body import read_plain
from sempre.engine.server.chat import create_chat_completion
from sempre.engine.server.completions import create_completion
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.service import Service


async def invoke(service: Service, http: Request) -> Response:
    """Answer as the endpoint does whose body this is. Raises what the endpoint raises."""
    http.state.body = await read_plain(http, service)
    names = set(http.state.body) if isinstance(http.state.body, dict) else ()
    if "messages" in names:
        return await create_chat_completion(service, http)
    if "prompt" in names:
        return await create_completion(service, http)
    raise BadRequest("The body must hold messages, as for /v1/chat/completions, or prompt, as for /v1/completions.")
