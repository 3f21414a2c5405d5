"""/tokenize takes what a chat request takes that reaches the prompt."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from sempre.engine.arguments import parse_arguments
from sempre.engine.frontend.frontend import Frontend
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.offload import Offload
from sempre.engine.server.tokenization import tokenize, tokenizer_info

TEMPLATE = "{{ messages[0].content }}{% for tool in tools or [] %} {{ tool.function.name }}{% endfor %}{{ mark }}"
CHAT = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look_up", "description": None}}


def service(template: str = TEMPLATE, **settings: Any) -> Any:
    """What the endpoints see of a server, the front end real and no engine behind it."""
    frontend = Frontend(parse_arguments("tiny", {"chat_template": template}))
    engine = SimpleNamespace(
        get_tokenizer=lambda: frontend.tokenizer,
        chat_arguments=frontend.chat_arguments,
        chat_template=frontend.chat_template,
        ready=SimpleNamespace(max_model_len=2048, vocab_size=4096),
    )
    config = ServerConfig(**settings)
    return SimpleNamespace(
        engine=engine,
        config=config,
        served_names=["tiny"],
        check_ready=lambda: None,
        max_json_values=10_000,
        check_text=lambda text: None,
    )


def text(made: Any, **fields: Any) -> str:
    """The text of what /tokenize gives for the fields."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}

    headers = [(b"content-type", b"application/json")]
    request = Request(
        {"type": "http", "method": "POST", "headers": headers, "path": "/tokenize", "client": ("127.0.0.1", 1)}, receive
    )

    async def answered() -> Any:
        made.offload = Offload()
        try:
            return await tokenize(made, request)
        finally:
            await made.offload.close()

    answer = asyncio.run(answered())
    tokens = json.loads(answer.body)["tokens"]
    return str(made.engine.get_tokenizer().decode(tokens))


def test_tools_and_variables_reach_the_template() -> None:
    made = service()
    assert text(made, messages=CHAT) == "Hi"
    assert text(made, messages=CHAT, tools=[TOOL], chat_template_kwargs={"mark": "!"}) == "Hi look_up!"


def test_a_request_s_own_template_must_be_trusted() -> None:
    template = "{{ messages | length }}"
    assert text(service(trust_request_chat_template=True), messages=CHAT, chat_template=template) == "1"
    with pytest.raises(BadRequest, match="trust-request-chat-template"):
        text(service(), messages=CHAT, chat_template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% set n = namespace(l=[]) %}{% for i in range(999) %}{% set n.l = n.l + ['a' * 9999999] %}{% endfor %}",
            "MiB of memory",
        ),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
    ],
)
def test_a_model_s_own_template_has_bounds(template: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        text(service(template), messages=CHAT)


def test_the_template_in_use_is_told() -> None:
    answer = asyncio.run(tokenizer_info(service(), Request({"type": "http"})))
    found = json.loads(answer.body)
    assert (found["chat_template"], found["model_max_length"]) == (TEMPLATE, 2048)
