"""/v1/responses, for OpenAI's clients. It stores nothing: a request holds its whole conversation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.server.agents.responses_input import NAMES, chat_request
from sempre.engine.server.agents.responses_output import ResponsesAnswer
from sempre.engine.server.agents.responses_requests import ResponsesRequest
from sempre.engine.server.agents.sampling import named_as
from sempre.engine.server.body import beside_the_loop, read_model, read_plain
from sempre.engine.server.conversation import open_conversation
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.generation import Encoder, EventStream
from sempre.engine.server.limits import check_sizes
from sempre.engine.server.load import load_header
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.service import Service


async def create_response(service: Service, http: Request) -> Response:
    """Answer a conversation. Raises errors that `errors.api_error` handles."""
    http.state.body = await read_plain(http, service)
    _refuse_references(http.state.body)
    request = await read_model(http, ResponsesRequest, service)
    with named_as(NAMES):
        chat = await beside_the_loop(http, service, lambda: _chat(request))
        conversation = await open_conversation(service, http, chat, "resp_")
    generation = conversation.generation
    with ExitStack() as stack:
        stack.enter_context(generation)
        answer = ResponsesAnswer(request, conversation)
        if request.stream:
            stack.pop_all()  # the stream closes it
            encoder = Encoder(answer.events, None)
            return EventStream(generation, answer.first_events(), encoder, answer.last_event, answer.failed_event)
        generation.watch(http.receive)
        [output] = await generation.finished()
        body = await generation.encoded(lambda: answer.whole(output))
    return Response(body, headers=await load_header(service, http), media_type="application/json")


def _chat(request: ResponsesRequest) -> ChatCompletionRequest:
    chat = chat_request(request)
    check_sizes(chat)
    return chat


def _refuse_references(body: Any) -> None:
    items = body.get("input") if isinstance(body, dict) else None
    for place, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict) and item.get("type") == "item_reference":
            raise BadRequest(
                f"input[{place}]: an item_reference names an item of a stored response, and this server stores none. "
                "Send the item itself.",
                param=f"input[{place}]",
            )
