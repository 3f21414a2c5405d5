"""Handles every request: its id, its key or other access check, its content type, its access log line.

The user's own middleware (`--middleware`) wraps it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sempre.engine.server.browsers import PageGuard
from sempre.engine.server.clients import Client, KeyRing
from sempre.engine.server.config import ServerConfig, load_middleware
from sempre.engine.server.errors import APIError
from sempre.engine.server.logs import REQUEST_ID

logger = logging.getLogger(__name__)

REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
# probes and scrapers have no key, nor does the page before its user has entered one
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/live", "/ready", "/metrics", "/version", "/openapi.json", "/docs"})
_SHOWN = 100
OPEN_PREFIXES = ("/playground/", "/docs/")
# POST without a body, so without its type; the check of pages has refused those of other sites
BODILESS_PATHS = frozenset({"/sleep", "/wake_up", "/pause", "/resume"})


class Turnstile:
    """Lets one request in per pass of the event loop, so that a health check need not wait for the work of a crowd that
    arrived before it: each request takes the loop a millisecond or two before its first wait."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def pass_through(self) -> None:
        """Wait for a turn, and for a pass of the event loop."""
        async with self._lock:
            await asyncio.sleep(0)


class RequestGate:
    """ASGI middleware: uses or creates X-Request-Id, finds the client, refuses unauthorised requests and those beyond
    its rates, writes the access log."""

    def __init__(self, app: ASGIApp, keys: KeyRing, config: ServerConfig) -> None:
        self._app = app
        self._keys = keys
        self._pages = PageGuard(config)
        self._access_log = config.enable_access_log and not config.disable_uvicorn_access_log
        self._turnstile = Turnstile()
        self._unlogged = frozenset(path.strip() for path in config.disable_access_log_for_endpoints.split(","))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"], state["server_send"], state["client"] = request_id, send, self._keys.anybody
        REQUEST_ID.set(request_id)
        status = 0
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
                message["headers"] += state["client"].headers()
                if "release_body" in state:
                    state["release_body"]()
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                if scope["method"] == "POST":
                    await self._turnstile.pass_through()
                await self._app(scope, receive, send_with_id)
            else:
                await refusal.response(scope["path"])(scope, receive, send_with_id)
        finally:
            status = state.get("refused_with", status)
            if self._access_log and (status >= 400 or scope["path"] not in self._unlogged):
                self._log(scope, status, time.monotonic() - began)

    def _refusal(self, scope: Scope, headers: Headers) -> APIError | None:
        """Return the error if the request is refused before its body is read."""
        path, method = scope["path"], scope["method"]
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES) or method == "OPTIONS":
            return None
        client = self._keys.anybody
        if self._keys:
            found = self._client(headers)
            if found is None:
                return _unauthorized(headers)
            scope["state"]["client"] = client = found
        else:
            refusal = self._pages.check(headers)
            if refusal is not None:
                return refusal
        if method == "POST":
            refusal = None if path in BODILESS_PATHS else _type_refusal(headers)
            return refusal or _rate_refusal(client)
        return None

    def _client(self, headers: Headers) -> Client | None:
        """Return the client whose key the request has."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = self._keys.find(key.strip()) if scheme.lower() == "bearer" else None
        # the header of Anthropic's clients
        return found or self._keys.find(headers.get("x-api-key", ""))

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        facts: dict[str, object] = {"status": status, "duration_s": round(seconds, 6)}
        generation = scope["state"].get("generation")
        if generation is not None:
            requests = generation.requests
            facts["prompt_tokens"] = sum(len(request.prompt_token_ids) for request in requests)
            facts["output_tokens"] = generation.num_tokens
            facts["seed"] = requests[0].seeds[0]
        logger.info("%s %s", scope["method"], scope["path"], extra={"facts": facts})


def _request_id(given: str | None) -> str:
    """Return the caller's id if it is harmless in logs and headers, else a new one."""
    return given if given is not None and REQUEST_ID_FORM.fullmatch(given) else secrets.token_hex(16)


def _type_refusal(headers: Headers) -> APIError | None:
    """Refuse other content types: browsers let any page send those to any server without a preflight request."""
    kind = headers.get("content-type")
    if kind is not None and kind.partition(";")[0].strip().lower() == "application/json":
        return None
    found = "none" if kind is None else repr(kind[:_SHOWN])
    return APIError(415, f"A request with a body needs the header `Content-Type: application/json`; found {found}.")


def _rate_refusal(client: Client) -> APIError | None:
    try:
        client.enter()
    except APIError as error:
        return error
    return None


def _unauthorized(headers: Headers) -> APIError:
    told = {"WWW-Authenticate": "Bearer"}
    if "authorization" not in headers and "x-api-key" not in headers:
        text = "You didn't provide an API key. Send it in the header `Authorization: Bearer KEY` or `x-api-key: KEY`."
        return APIError(401, text, headers=told)
    return APIError(401, "Incorrect API key provided.", headers=told)


def wrapped(app: ASGIApp, names: Sequence[str]) -> ASGIApp:
    """Return `app` wrapped in the middleware; the last one named is the outermost."""
    for middleware in load_middleware(names):
        found: Any = middleware
        if inspect.isclass(found):
            app = cast(Any, found)(app)
        else:
            from starlette.middleware.base import BaseHTTPMiddleware

            app = BaseHTTPMiddleware(app, dispatch=found)
    return app
