"""Conversations in the engine: what /v1/chat/completions, /v1/responses and /v1/messages have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from sempre.engine.frontend.prompts import TokensPrompt
from sempre.engine.server.beams import beam_parameters
from sempre.engine.server.generation import Generation
from sempre.engine.server.message_parser import MessageParser
from sempre.engine.server.parameters import apply_server_defaults, blame_on, chat_parameters, check_model
from sempre.engine.server.prompts import check_form, id_of, render
from sempre.engine.server.receipts import asks_for_receipts
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.service import Service
from sempre.engine.server.tools import ChatPlan
from sempre.engine.server.tracing import RequestSpan


@dataclass(frozen=True)
class Conversation:
    """An admitted request; close `generation` at its end."""

    request: ChatCompletionRequest
    generation: Generation
    parsers: list[MessageParser]
    """one per choice"""
    response_id: str
    model: str
    """as the response names it"""
    fingerprint: str


async def open_conversation(
    service: Service, http: Request, request: ChatCompletionRequest, id_prefix: str
) -> Conversation:
    """Check a request, render its prompt and start it. Raises errors that `errors.api_error` handles."""
    service.check_ready()
    check_model(request.model, service.served_names)
    apply_server_defaults(request, service.config)
    params = chat_parameters(request, service.default_parameters(request), service.config)
    plan = ChatPlan.of(request, service.config)
    prompt = await conversation_prompt(service, http, request, plan)
    skips = params.skip_special_tokens and not plan.reads_special_tokens
    params = dataclasses.replace(params, structured_outputs=plan.form, skip_special_tokens=skips)
    search = beam_parameters(request, params)
    gives_receipts = await asks_for_receipts(service, http, searches=search is not None)
    if request.cache_salt is not None:
        prompt["cache_salt"] = request.cache_salt
    if request.truncate_prompt_tokens is None:
        service.checked_length(list(prompt["prompt_token_ids"]))
    with blame_on(request):
        await check_form(params, service, http)
    response_id = id_prefix + id_of(request, http)
    with RequestSpan.begin(http, service, params) as span, blame_on(request):
        stream = service.open(
            http.state.client, [prompt], params, request.priority, search, gives_receipts, request.model
        )
        generation = Generation(service, stream, span, gives_receipts=gives_receipts)
    http.state.generation = generation
    try:
        parsers = plan.message_parsers(generation.requests[0], service.engine.get_tokenizer(), request.n)
        fingerprint = service.engine.fingerprint_of(generation.requests[0])
    except BaseException:
        generation.close()
        raise
    model = request.model or service.model_names[0]
    return Conversation(request, generation, parsers, response_id, model, fingerprint)


async def conversation_prompt(
    service: Service, http: Request, request: ChatCompletionRequest, plan: ChatPlan
) -> TokensPrompt:
    """Return the prompt that the chat template makes of a request. Raises BadRequest, ConfigError, RequestError."""
    return await render(
        service,
        http,
        request.messages,
        chat_template_kwargs=template_variables(request),
        chat_template=request.chat_template,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=bool(request.add_special_tokens),
        tools=plan.template_tools,
    )


def template_variables(request: ChatCompletionRequest) -> dict[str, Any]:
    """Return a request's variables for the chat template."""
    variables = dict(request.chat_template_kwargs or {})
    if request.documents is not None:
        variables["documents"] = request.documents
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    if request.reasoning_effort == "none":
        # the name that most templates with optional reasoning use
        variables.setdefault("enable_thinking", False)
    return variables
