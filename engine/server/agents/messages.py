"""/v1/messages and /v1/messages/count_tokens, for Anthropic's clients."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.server.agents.messages_input import NAMES, chat_request
from sempre.engine.server.agents.messages_output import MessagesAnswer, TokenCount, failed_event
from sempre.engine.server.agents.messages_requests import CountTokensRequest, MessagesRequest
from sempre.engine.server.agents.sampling import named_as
from sempre.engine.server.body import beside_the_loop, read_model
from sempre.engine.server.conversation import conversation_prompt, open_conversation
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.generation import Encoder, EventStream
from sempre.engine.server.limits import check_sizes
from sempre.engine.server.load import load_header
from sempre.engine.server.parameters import check_model
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.service import Service
from sempre.engine.server.tools import ChatPlan

Model = TypeVar("Model", bound=CountTokensRequest)

_VERSION_HEADER, _OLDEST = "anthropic-version", "2023-06-01"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


async def create_message(service: Service, http: Request) -> Response:
    """Answer a conversation. Raises errors that `errors.api_error` handles."""
    request = await _read(service, http, MessagesRequest)
    with named_as(NAMES):
        chat = await _chat(service, http, request)
        conversation = await open_conversation(service, http, chat, "msg_")
    generation = conversation.generation
    with ExitStack() as stack:
        stack.enter_context(generation)
        answer = MessagesAnswer(conversation, splits_reasoning=bool(service.config.reasoning_parser))
        if request.stream:
            stack.pop_all()  # the stream closes it
            return EventStream(generation, [], Encoder(answer.events, None), answer.last_events, failed_event)
        generation.watch(http.receive)
        [output] = await generation.finished()
        body = await generation.encoded(lambda: answer.whole(output))
    return Response(body, headers=await load_header(service, http), media_type="application/json")


async def count_tokens(service: Service, http: Request) -> Response:
    """Return the number of tokens of a conversation. Raises errors that `errors.api_error` handles."""
    request = await _read(service, http, CountTokensRequest)
    service.check_ready()
    check_model(request.model, service.served_names)
    with named_as(NAMES):
        chat = await _chat(service, http, request)
        prompt = await conversation_prompt(service, http, chat, ChatPlan.of(chat, service.config))
    body = msgspec.json.encode(TokenCount(len(prompt["prompt_token_ids"])))
    return Response(body, media_type="application/json")


async def _read(service: Service, http: Request, model: type[Model]) -> Model:
    version = http.headers.get(_VERSION_HEADER, _OLDEST)
    # older ones have other events
    if not _DATE.fullmatch(version) or version < _OLDEST:
        raise BadRequest(f"The header {_VERSION_HEADER} must be {_OLDEST} or a later date, got {version[:80]!r}.")
    return await read_model(http, model, service)


async def _chat(service: Service, http: Request, request: CountTokensRequest) -> ChatCompletionRequest:
    service.check_ready()
    template = service.engine.chat_template or ""

    def convert() -> ChatCompletionRequest:
        chat = chat_request(request, service.config, template)
        check_sizes(chat)
        return chat

    return await beside_the_loop(http, service, convert)
