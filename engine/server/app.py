"""The application: its routes, and endpoints about the server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sempre.engine.server import openapi
from sempre.engine.server.adapter_calls import load_lora_adapter, unload_lora_adapter
from sempre.engine.server.agents.messages import count_tokens, create_message
from sempre.engine.server.agents.responses import create_response
from sempre.engine.server.body import read_plain
from sempre.engine.server.chat import create_chat_completion
from sempre.engine.server.clients import KeyRing
from sempre.engine.server.completions import create_completion
from sempre.engine.server.docs import DOCS_ROUTES
from sempre.engine.server.errors import APIError, BadRequest, api_error
from sempre.engine.server.load import load, metrics
from sempre.engine.server.middleware import OPEN_PATHS, RequestGate, wrapped
from sempre.engine.server.parameters import check_model
from sempre.engine.server.playground import PLAYGROUND_ROUTES
from sempre.engine.server.pooling import classify, create_embeddings, create_pooling, create_scores, rerank
from sempre.engine.server.responses import ModelCard, ModelList
from sempre.engine.server.service import Service
from sempre.engine.server.sleep import is_paused, is_sleeping, pause, resume, sleep, wake_up
from sempre.engine.server.tokenization import detokenize, tokenize, tokenizer_info
from sempre.engine.version import __version__

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def create_app(service: Service, keys: KeyRing) -> ASGIApp:
    """Return the ASGI application of `service`."""
    config = service.config
    open_paths = OPEN_PATHS if keys else None
    description = msgspec.json.encode(openapi.description(config.root_path, open_paths=open_paths))

    async def described(_request: Request) -> Response:
        return Response(description, media_type="application/json")

    routes = [_route(service, operation, _ENDPOINTS[operation.path]) for operation in openapi.OPERATIONS]
    app = Starlette(
        routes=[*routes, Route("/openapi.json", described), *DOCS_ROUTES, *PLAYGROUND_ROUTES],
        exception_handlers={HTTPException: _http_error},
    )

    async def rooted(scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn's setting of that name would prepend the root to every path
        scope["root_path"] = config.root_path
        await app(scope, receive, send)

    outer: ASGIApp = wrapped(RequestGate(rooted if config.root_path else app, keys, config), config.middleware)
    if config.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        outer = CORSMiddleware(outer, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"])
    return outer


def _route(service: Service, operation: openapi.Operation, endpoint: Endpoint) -> Route:
    async def answered(request: Request) -> Response:
        try:
            return await endpoint(service, request)
        # Any failure of a request becomes its response and does not affect others.
        except Exception as error:
            return api_error(error).response(operation.path)

    return Route(operation.path, answered, methods=[operation.method], name=operation.name)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{request.method} {request.url.path}"
    missing = f"Not found: {found}."
    if request.url.path.startswith("/v1/responses/"):
        missing += " This server stores no responses."
    message = {404: missing, 405: f"Method not allowed: {found}."}.get(error.status_code, error.detail)
    return APIError(error.status_code, message, headers=dict(error.headers or {})).response(request.url.path)


async def _models(service: Service, _request: Request) -> Response:
    service.check_ready()
    cards = [_card(service, name) for name in service.served_names]
    return Response(msgspec.json.encode(ModelList(cards)), media_type="application/json")


async def _model(service: Service, request: Request) -> Response:
    service.check_ready()
    name = request.path_params["model"]
    check_model(name, service.served_names)
    return Response(msgspec.json.encode(_card(service, name)), media_type="application/json")


def _card(service: Service, name: str) -> ModelCard:
    length, adapter = service.engine.ready.max_model_len, service.adapters.of(name)
    if adapter is None:
        return ModelCard(name, service.created, length, service.engine.config.model)
    parent = adapter.base_model_name or service.model_names[0]
    return ModelCard(name, service.created, length, adapter.lora_path, parent)


async def _live(_service: Service, _request: Request) -> Response:
    return JSONResponse({"status": "live"})


async def _ready(service: Service, _request: Request) -> Response:
    service.check_ready()
    if service.admission.draining:
        service.admission.admit(0)
    return JSONResponse({"status": "ready"})


async def _health(service: Service, _request: Request) -> Response:
    found = await service.engine.health()
    problems = [{"rank": problem.rank, "reason": problem.text} for problem in found.problems]
    answer = {
        "status": "healthy" if found.healthy else "unhealthy",
        "state": found.state,
        "problems": problems,
        "workers": found.workers,
    }
    return Response(msgspec.json.encode(answer), 503 if problems else 200, media_type="application/json")


async def _ranks(service: Service, _request: Request) -> Response:
    """Every worker in detail, with stacks of those that lag: for whoever runs the server, not for everyone."""
    service.check_ready()
    found = await service.engine.health()
    problems = [{"rank": problem.rank, "reason": problem.text} for problem in found.problems]
    answer = {"state": found.state, "problems": problems, "ranks": found.ranks}
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _ping(service: Service, request: Request) -> Response:
    """SageMaker's health check: 200 once requests are accepted."""
    service.check_ready()
    return await _health(service, request)


async def _version(_service: Service, _request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _server_info(service: Service, _request: Request) -> Response:
    service.check_ready()
    engine = service.engine
    ready = engine.ready
    shown = msgspec.to_builtins(service.config)
    shown["api_key"] = f"{len(shown['api_key'])} keys"
    return JSONResponse(
        {
            "version": __version__,
            "fingerprint": engine.fingerprint,
            "fingerprint_parts": engine.fingerprint_parts,
            "fingerprint_environment": engine.fingerprint_environment,
            "engine_config": msgspec.to_builtins(engine.config),
            "server_config": shown,
            "limits": {
                "max_model_len": ready.max_model_len,
                "vocab_size": ready.vocab_size,
                "num_blocks": ready.num_blocks,
                "block_size": ready.block_size,
                "max_num_batched_tokens": ready.max_num_batched_tokens,
                "max_num_seqs": ready.max_num_seqs,
                "world_size": ready.world_size,
            },
            "startup_seconds": service.startup_seconds,
        }
    )


async def _invoke(service: Service, http: Request) -> Response:
    """/invocations, SageMaker's endpoint: the body's fields decide between chat and completion."""
    http.state.body = await read_plain(http, service)
    names = set(http.state.body) if isinstance(http.state.body, dict) else ()
    if "messages" in names:
        return await create_chat_completion(service, http)
    if "prompt" in names:
        return await create_completion(service, http)
    raise BadRequest("The body must hold messages, as for /v1/chat/completions, or prompt, as for /v1/completions.")


_ENDPOINTS: dict[str, Endpoint] = {
    "/v1/completions": create_completion,
    "/v1/chat/completions": create_chat_completion,
    "/v1/responses": create_response,
    "/v1/messages": create_message,
    "/v1/messages/count_tokens": count_tokens,
    "/v1/embeddings": create_embeddings,
    "/pooling": create_pooling,
    "/classify": classify,
    "/score": create_scores,
    "/v1/score": create_scores,
    "/rerank": rerank,
    "/v1/rerank": rerank,
    "/v2/rerank": rerank,
    "/v1/load_lora_adapter": load_lora_adapter,
    "/v1/unload_lora_adapter": unload_lora_adapter,
    "/sleep": sleep,
    "/wake_up": wake_up,
    "/is_sleeping": is_sleeping,
    "/pause": pause,
    "/resume": resume,
    "/is_paused": is_paused,
    "/v1/models": _models,
    "/v1/models/{model:path}": _model,
    "/invocations": _invoke,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/tokenizer_info": tokenizer_info,
    "/health": _health,
    "/ping": _ping,
    "/live": _live,
    "/ready": _ready,
    "/metrics": metrics,
    "/version": _version,
    "/load": load,
    "/server_info": _server_info,
    "/debug/ranks": _ranks,
}
