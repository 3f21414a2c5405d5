"""From a request's prompts to token ids, off the event loop if they are long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request

from sempre.engine.frontend.prompts import PromptType, TokensPrompt
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.limits import MAX_PROMPT_TOKENS
from sempre.engine.server.middleware import REQUEST_ID_FORM
from sempre.engine.server.offload import LONG_BYTES
from sempre.engine.server.service import Service


class PromptFields(Protocol):
    """What a request may say of its prompts."""

    truncate_prompt_tokens: int | None
    cache_salt: str | None


async def prompts_of(
    request: PromptFields, given: Any, field: str, service: Service, http: Request
) -> list[PromptType]:
    """Return the prompts in `field` of a request. Raises BadRequest for too many of them, or too long ones."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise BadRequest(f"{field} must hold at least one prompt.", param=field)
    check_number(field, len(given), service)
    if len(set(map(type, given))) > 1:
        raise BadRequest(f"{field} must hold texts only, or lists of token ids only, or token ids only.", param=field)
    found = (
        await _encoded(given, request, service, http) if isinstance(given[0], str) else _tokens(given, request, service)
    )
    if request.cache_salt is not None:
        for prompt in found:
            prompt["cache_salt"] = request.cache_salt
    return found


def check_number(field: str, count: int, service: Service) -> None:
    """Raise BadRequest for more prompts than a request may have."""
    if count > service.config.max_prompts:
        raise BadRequest(
            f"{field} can hold at most {service.config.max_prompts} prompts (--max-prompts), got {count}.",
            param=field,
        )


def _tokens(given: Sequence[list[int]], request: PromptFields, service: Service) -> list[Any]:
    if request.truncate_prompt_tokens is None:
        for token_ids in given:
            service.checked_length(token_ids)
    _check_total(sum(map(len, given)), service)
    return [{"prompt_token_ids": token_ids} for token_ids in given]


async def _encoded(texts: Sequence[str], request: PromptFields, service: Service, http: Request) -> list[Any]:
    special = getattr(request, "add_special_tokens", True) is not False
    if http.state.body_bytes <= LONG_BYTES:
        if special:
            return [{"prompt": text} for text in texts]
        encode = service.engine.get_tokenizer().encode
        return [{"prompt": text, "prompt_token_ids": encode(text, False)} for text in texts]
    whole = request.truncate_prompt_tokens is None
    return await service.offload.in_thread(client_of(http), _encode_all, texts, special, whole, service)


def _encode_all(texts: Sequence[str], special: bool, whole: bool, service: Service) -> list[dict[str, Any]]:
    """Encode the texts in order; stop at the first that is too long."""
    tokenizer = service.engine.get_tokenizer()
    found, total = [], 0
    for text in texts:
        service.check_text(text)
        # unlike `encode`, this lets the event loop run
        [token_ids] = tokenizer.encode_batch([text], special)
        if whole:
            service.checked_length(token_ids)
        total += len(token_ids)
        _check_total(total, service)
        found.append({"prompt": text, "prompt_token_ids": token_ids})
    return found


def _check_total(num_tokens: int, service: Service) -> None:
    most = max(MAX_PROMPT_TOKENS, service.engine.ready.max_model_len)
    if num_tokens > most:
        raise BadRequest(
            f"The prompts of one request may have at most {most} tokens in all; send several requests.", param="prompt"
        )


async def encode(text: str, service: Service, http: Request, *, special: bool) -> list[int]:
    """Return the token ids of a text of any length. Raises BadRequest for one far beyond the context."""
    service.check_text(text)
    tokenizer = service.engine.get_tokenizer()
    if len(text) <= LONG_BYTES:
        return tokenizer.encode(text, special)
    return (await service.offload.in_thread(client_of(http), tokenizer.encode_batch, [text], special))[0]


async def render(
    service: Service,
    http: Request,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template_kwargs: Mapping[str, Any] | None,
    add_special_tokens: bool = False,
    **keywords: Any,
) -> TokensPrompt:
    """Return the conversation as a prompt. Raises BadRequest, ConfigError, RequestError."""
    for message in messages:
        service.check_text(str(message.get("content")) if isinstance(message.get("content"), str) else "")
    arguments = service.engine.chat_arguments(messages, chat_template_kwargs=chat_template_kwargs, **keywords)
    # a model's own template has limits of time and memory too, since it is untrusted
    if http.state.body_bytes > LONG_BYTES or keywords.get("chat_template") is not None:
        text = await service.offload.in_helper(client_of(http), "render_chat", arguments)
    else:
        text = await service.offload.in_urgent_helper("render_chat", arguments)
    # The template writes the special tokens itself.
    return {"prompt": text, "prompt_token_ids": await encode(text, service, http, special=add_special_tokens)}


class Named(Protocol):
    """A request that may have a name of its own."""

    request_id: str | None


async def check_form(params: SamplingParams, service: Service, http: Request) -> None:
    """Check the form of the output before the request is built on the event loop. Raises RequestError."""
    if params.structured_outputs is not None:
        # a short one may be slow, too
        await service.offload.in_thread(client_of(http), service.engine.check_form, params)


def id_of(request: Named, http: Request) -> str:
    """Return the suffix of the response's id: X-Request-Id, `request_id`, or a new one. Raises BadRequest."""
    given, state = request.request_id, http.state
    if given is None or http.headers.get("x-request-id") == state.request_id:
        return str(state.request_id)
    if not REQUEST_ID_FORM.fullmatch(given):
        raise BadRequest(
            "request_id may have at most 128 letters, digits and characters of '._:/-'.", param="request_id"
        )
    return given


def client_of(http: Request) -> str:
    """Return the client to which a request's jobs are charged."""
    return http.client.host if http.client is not None else ""
