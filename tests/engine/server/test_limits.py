"""What is too large is refused by name before anything is made of it; what passes is bounded."""

from __future__ import annotations

import hostile_bodies
import msgspec
import pytest

from sempre.engine.server.body import parse_model
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError, BadRequest
from sempre.engine.server.limits import check_sizes
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)

MODELS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


@pytest.mark.parametrize("name", hostile_bodies.BODIES)
def test_what_is_left_of_a_hostile_body_is_small(name: str) -> None:
    path, make = hostile_bodies.BODIES[name]
    body = make()
    if len(body) > ServerConfig().max_body_bytes or path not in MODELS:
        return
    request = passed(body, MODELS[path])
    if isinstance(request, GenerationRequest):
        assert sum(map(len, request.bad_words or ())) <= 8192
        assert len(request.logit_bias or ()) <= 4096


def passed(body: bytes, model: type[msgspec.Struct]) -> msgspec.Struct | None:
    try:
        request = parse_model(body, model)
        check_sizes(request)
    except APIError as error:
        refusal = error
    else:
        return request
    assert refusal.status in (400, 413)
    assert len(str(refusal)) < 1100
    return None


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"stop": "x" * 20_000}, "stop", 400),
        ({"stop": ["x"] * 257}, "stop", 400),
        ({"bad_words": ["x" * 100] * 100}, "bad_words", 400),
        ({"logit_bias": {str(i): 1.0 for i in range(5000)}}, "logit_bias", 400),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", 400),
        ({"cache_salt": "x" * 1025}, "cache_salt", 400),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs", 413),
    ],
)
def test_what_is_too_large_is_refused_by_name(fields: dict[str, object], param: str, status: int) -> None:
    with pytest.raises(APIError) as refused:
        check_sizes(CompletionRequest(prompt="a", **fields))  # type: ignore[arg-type]
    assert (refused.value.param, refused.value.status) == (param, status)


def test_ordinary_requests_pass() -> None:
    check_sizes(CompletionRequest(prompt="a" * 10**6, stop=["a", "b"], bad_words=["x"] * 100, logit_bias={"5": -100.0}))
    check_sizes(TokenizeRequest(messages=[{"role": "user", "content": "a"}] * 1000))
    with pytest.raises(BadRequest, match="messages may hold at most"):
        check_sizes(TokenizeRequest(messages=[{}] * 20_000))
