"""Who may call a server without keys, and what every body must be: through the middleware, without a socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from sempre.engine.server.api_keys import ApiKey
from sempre.engine.server.clients import KeyRing
from sempre.engine.server.config import server_config
from sempre.engine.server.ledger import Ledger
from sempre.engine.server.middleware import RequestGate

JSON = {"content-type": "application/json"}
BROWSER = {"user-agent": "Mozilla/5.0"}
PROXY = {"x-forwarded-for": "203.0.113.7"}


async def _reached(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def call(
    headers: dict[str, str],
    *,
    method: str = "POST",
    path: str = "/v1/completions",
    keys: tuple[str, ...] = (),
    **settings: Any,
) -> tuple[int, str]:
    """Return the status and the message of an error."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b""}
    ring = KeyRing([ApiKey(secret=key, name=key) for key in keys], Ledger())
    gate = RequestGate(_reached, ring, server_config({"enable_access_log": False, **settings}))
    asyncio.run(gate(scope, receive, send))
    body = json.loads(sent[1]["body"])
    return sent[0]["status"], body["error"]["message"] if "error" in body else ""


@pytest.mark.parametrize(
    ("path", "settings", "logged"),
    [
        ("/v1/models", {}, True),
        ("/health", {}, False),
        ("/metrics", {}, False),
        ("/health", {"disable_access_log_for_endpoints": ""}, True),
        ("/v1/models", {"disable_access_log_for_endpoints": "/health, /v1/models"}, False),
        ("/health", {"disable_access_log_for_endpoints": "/v1/models"}, True),
    ],
)
def test_probes_are_not_logged(
    caplog: pytest.LogCaptureFixture, path: str, settings: dict[str, Any], logged: bool
) -> None:
    with caplog.at_level("INFO"):
        assert call({"host": "127.0.0.1"}, method="GET", path=path, enable_access_log=True, **settings)[0] == 200
    assert [record.getMessage() for record in caplog.records] == [f"GET {path}"] * logged


def test_a_refused_request_is_always_logged(caplog: pytest.LogCaptureFixture) -> None:
    silent = {"disable_access_log_for_endpoints": "/v1/models"}
    with caplog.at_level("INFO"):
        assert call({}, method="GET", path="/v1/models", keys=("k",), enable_access_log=True, **silent)[0] == 401
    assert [record.getMessage() for record in caplog.records] == ["GET /v1/models"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "10.1.2.3",
        "[::1]:8000",
        "[fe80::1%25eth0]",
        "localhost",
        "LOCALHOST:8000",
        "a.localhost:1",
        "sempre:8000",  # a service of Compose or Kubernetes
        "sempre.prod.svc",
        "sempre.prod.svc.cluster.local:8000",
        "metadata.internal",
        "bound.example:8000",
        "named.example",
        "a.wild.example",
    ],
)
def test_names_that_no_site_can_take(host: str) -> None:
    settings: dict[str, Any] = {"host": "bound.example", "allowed_hosts": ["named.example", "*.wild.example"]}
    assert call({"host": host, **JSON}, **settings)[0] == 200
    assert call({"host": host, "origin": f"http://{host}", **JSON}, **settings)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "wild.example.", "1.2.3.4.5"]
)
@pytest.mark.parametrize("more", [{}, BROWSER, {"origin": "http://evil.example"}, {"origin": "null"}])
def test_a_site_that_gives_its_name_to_this_server(host: str, more: dict[str, str]) -> None:
    for method in ("POST", "GET"):
        status, message = call({"host": host, **JSON, **more}, method=method, allowed_hosts=["*.wild.example"])
        assert status == 403
        assert "--allowed-hosts" in message
    assert call({"host": host, **JSON, **more}, path="/health", method="GET")[0] == 200
    assert call({"host": host, **JSON, **more}, allowed_hosts=["*"], allowed_origins=["*"])[0] == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1:3000",
        "https://127.0.0.1:8000.evil.example",
        "http://[",
        "file://",
    ],
)
def test_a_page_of_another_origin(origin: str) -> None:
    headers = {"host": "127.0.0.1:8000", "origin": origin, **JSON}
    status, message = call(headers)
    assert status == 403
    assert "--allowed-origins" in message
    assert call(headers, allowed_origins=[origin])[0] == 200
    assert call(headers, keys=("k",))[0] == 401
    assert call({**headers, "authorization": "Bearer k"}, keys=("k",))[0] == 200


def test_default_ports() -> None:
    assert call({"host": "localhost", "origin": "http://localhost:80", **JSON})[0] == 200
    assert call({"host": "localhost:443", "origin": "https://localhost", **JSON})[0] == 200
    assert call({"host": "localhost", "origin": "http://localhost:443", **JSON})[0] == 403


def test_behind_a_proxy() -> None:
    """Programs pass whatever name the proxy forwards; pages, if the operator names it or the proxy keeps ours."""
    public = {"host": "llm.example.com", **JSON, **PROXY}
    assert call(public)[0] == 200
    assert call(public, method="GET")[0] == 200
    page = {**public, **BROWSER, "origin": "https://llm.example.com"}
    assert call(page)[0] == 403
    assert call(page, allowed_hosts=["llm.example.com"])[0] == 200
    assert call({**page, "host": "127.0.0.1:8000", "x-forwarded-host": "llm.example.com"})[0] == 200


def test_without_a_host_and_on_a_socket_file() -> None:
    assert call(JSON)[0] == 200
    assert call({"host": "evil.example", "origin": "http://evil.example", **JSON}, uds="/tmp/a")[0] == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=a", 415),
        ("text/plain; application/json", 415),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
    ],
)
@pytest.mark.parametrize("keys", [(), ("k",)])
def test_a_body_says_that_it_is_json(kind: str | None, status: int, keys: tuple[str, ...]) -> None:
    headers = {"host": "localhost", "authorization": "Bearer k"} | ({} if kind is None else {"content-type": kind})
    found, message = call(headers, keys=keys)
    assert found == status
    assert status == 200 or "Content-Type: application/json" in message
    assert call(headers, keys=keys, method="GET")[0] == 200
