"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.server.body import read_model
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.limits import check_entries
from sempre.engine.server.offload import LONG_BYTES
from sempre.engine.server.parameters import check_model, check_template
from sempre.engine.server.prompts import client_of, encode, render
from sempre.engine.server.requests import DetokenizeRequest, TokenizeRequest
from sempre.engine.server.responses import DetokenizeResponse, TokenizeResponse
from sempre.engine.server.service import Service

_MAX_TOKENS = 1 << 17


async def tokenize(service: Service, http: Request) -> Response:
    """Return the token ids of a text or a conversation."""
    request = await read_model(http, TokenizeRequest, service)
    service.check_ready()
    check_model(request.model, service.served_names)
    if (request.prompt is None) == (request.messages is None):
        raise BadRequest("give either prompt or messages.", param="prompt")
    check_template(request.chat_template, service.config)
    tokenizer = service.engine.get_tokenizer()
    if request.messages is not None:
        prompt = await render(
            service,
            http,
            request.messages,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
            tools=[msgspec.to_builtins(tool) for tool in request.tools or []],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=bool(request.add_special_tokens),
        )
        token_ids = list(prompt["prompt_token_ids"])
    else:
        special = request.add_special_tokens is not False
        token_ids = await encode(request.prompt or "", service, http, special=special)
    tokens = tokenizer.convert_ids_to_tokens(token_ids) if request.return_token_strs else None
    body = TokenizeResponse(len(token_ids), service.engine.ready.max_model_len, token_ids, tokens)
    return Response(msgspec.json.encode(body), media_type="application/json")


async def detokenize(service: Service, http: Request) -> Response:
    """Return the text of token ids."""
    request = await read_model(http, DetokenizeRequest, service)
    service.check_ready()
    check_model(request.model, service.served_names)
    size = service.engine.ready.vocab_size
    check_entries("tokens", request.tokens, max(_MAX_TOKENS, service.engine.ready.max_model_len))
    largest = max(request.tokens, default=0)
    if largest >= size:
        raise BadRequest(f"Token id {largest} is out of vocabulary: ids are in [0, {size}).", param="tokens")
    decode = service.engine.get_tokenizer().batch_decode
    if len(request.tokens) > LONG_BYTES:
        [text] = await service.offload.in_thread(client_of(http), decode, [request.tokens], False)
    else:
        [text] = decode([request.tokens], False)
    return Response(msgspec.json.encode(DetokenizeResponse(text)), media_type="application/json")


async def tokenizer_info(service: Service, http: Request) -> Response:
    """Return the model's tokenizer_config.json and the chat template in use."""
    service.check_ready()
    tokenizer = service.engine.get_tokenizer()
    found = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.init_kwargs}
    found["chat_template"] = service.engine.chat_template
    return Response(msgspec.json.encode(found), media_type="application/json")
