"""What a body may hold: every field with null, a neutral value, a value of another type, and one out of range."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from sempre.engine.server import body as bodies
from sempre.engine.server.app import _invoke
from sempre.engine.server.body import parse_model
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError, BadRequest, Busy
from sempre.engine.server.limits import MAX_CONTAINERS, MAX_DEPTH, MAX_MEMBERS, MAX_VALUES, check_structure
from sempre.engine.server.neutral import NEUTRAL
from sempre.engine.server.pooling_requests import (
    ClassificationRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

MESSAGE = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
BASES: dict[type[Any], dict[str, Any]] = {
    CompletionRequest: {"prompt": "It is"},
    ChatCompletionRequest: {"messages": [MESSAGE]},
    TokenizeRequest: {},
    DetokenizeRequest: {"tokens": [1]},
    EmbeddingRequest: {"input": "a"},
    PoolingRequest: {"input": "a"},
    ClassificationRequest: {"input": "a"},
    ScoreRequest: {},
    RerankRequest: {"query": "a", "documents": ["b"]},
}
# (body, where fields may be in it, the struct that they belong to)
PLACES: list[tuple[type[Any], tuple[str | int, ...], dict[str, Any]]] = [
    *((model, (), base) for model, base in BASES.items()),
    (CompletionRequest, ("stream_options",), {"prompt": "a", "stream_options": {}}),
    (CompletionRequest, ("response_format",), {"prompt": "a", "response_format": {"type": "text"}}),
    (
        CompletionRequest,
        ("response_format", "json_schema"),
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    ),
    (ChatCompletionRequest, ("tools", 0), {"messages": [MESSAGE], "tools": [TOOL]}),
    (ChatCompletionRequest, ("tools", 0, "function"), {"messages": [MESSAGE], "tools": [TOOL]}),
    (
        ChatCompletionRequest,
        ("tool_choice",),
        {"messages": [MESSAGE], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
]


def parsed(model: type[Any], body: Any, **keywords: bool) -> Any:
    return parse_model(json.dumps(body).encode(), model, **keywords)


def struct_at(model: type[Any], place: tuple[str | int, ...]) -> type[Any]:
    found: Any = msgspec.inspect.type_info(model)
    for name in place:
        found = inside(found, name)
    cls: type[Any] = next(info for info in flat(found) if isinstance(info, msgspec.inspect.StructType)).cls
    return cls


def flat(info: Any) -> Iterator[Any]:
    if isinstance(info, msgspec.inspect.Metadata):
        yield from flat(info.type)
    elif isinstance(info, msgspec.inspect.UnionType):
        for each in info.types:
            yield from flat(each)
    else:
        yield info


def inside(info: Any, name: str | int) -> Any:
    for each in flat(info):
        if isinstance(name, int) and isinstance(each, msgspec.inspect.ListType):
            return each.item_type
        if isinstance(each, msgspec.inspect.StructType):
            return next(field.type for field in each.fields if field.encode_name == name)
    raise AssertionError(name)


def with_field(base: dict[str, Any], place: tuple[str | int, ...], name: str, value: object) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(json.dumps(base))
    found: Any = body
    for step in place:
        found = found[step]
    found[name] = value
    return body


def path_of(place: tuple[str | int, ...], name: str) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return f"{text}.{name}".removeprefix(".")


def cases() -> list[Any]:
    return [
        pytest.param(model, place, base, name, id=f"{model.__name__}-{path_of(place, name)}")
        for model, place, base in PLACES
        for name in [*struct_at(model, place).__struct_encode_fields__, *NEUTRAL.get(struct_at(model, place), {})]
    ]


FIELDS = pytest.mark.parametrize(("model", "place", "base", "name"), cases())


@FIELDS
def test_null_is_left_out(model: type[Any], place: tuple[str | int, ...], base: dict[str, Any], name: str) -> None:
    info = next(iter(flat(msgspec.inspect.type_info(struct_at(model, place)))))
    required = {field.encode_name for field in info.fields if field.required}
    if name in required:
        with pytest.raises(BadRequest, match="is missing") as refused:
            parsed(model, with_field(base, place, name, None))
        assert refused.value.param == path_of(place, name)
    else:
        assert parsed(model, with_field(base, place, name, None)) == parsed(model, base)


@FIELDS
def test_another_type_is_refused_by_path(
    model: type[Any], place: tuple[str | int, ...], base: dict[str, Any], name: str
) -> None:
    values = (True, 17, 0.5, "text", [None], [[True]], {"a": [None]})
    refusals = [refusal for value in values if (refusal := refused_for(model, with_field(base, place, name, value)))]
    assert len(refusals) >= 4
    for refusal in refusals:
        assert (refusal.param or "").startswith(path_of(place, name)), refusal
        assert not {"NoneType", "int`", "str`", "Struct"} & set(str(refusal).split())


def refused_for(model: type[Any], body: Any) -> BadRequest | None:
    try:
        parsed(model, body)
    except BadRequest as error:
        return error
    return None


@pytest.mark.parametrize(("model", "base"), BASES.items())
def test_neutral_values_have_no_effect(model: type[Any], base: dict[str, Any]) -> None:
    for name, neutral in NEUTRAL[model].items():
        samples: dict[Any, Any] = {str: "x", bool: True, int: 3, dict[str, Any]: {"a": {"b": None}}}
        for value in (samples[neutral.kind],) if neutral.values is None else neutral.values:
            assert parsed(model, {**base, name: value}) == parsed(model, base), name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"guided_json": {}}, "guided_json"),
        ({"n": 0}, "n"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"n": 1.5}, "n"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"stop": ["a", None]}, "stop[1]"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
    ],
)
def test_what_would_change_the_answer_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parsed(CompletionRequest, {"prompt": "a", **fields})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"guided_json": {"type": "object"}}, 'Use structured_outputs: {"json": …}'),
        ({"guided_choice": ["a"]}, 'Use structured_outputs: {"choice": …}'),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs is supported as {} only, found an object"),
    ],
)
def test_what_to_do_instead(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(text)):
        parsed(CompletionRequest, {"prompt": "a", **fields})


def test_chat_fields_that_would_change_the_answer() -> None:
    for name, value in [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("functions", [{}]),
        ("tool_choice", "all"),
        ("reasoning_effort", "huge"),
    ]:
        with pytest.raises(BadRequest) as refused:
            parsed(ChatCompletionRequest, {"messages": [MESSAGE], name: value})
        assert refused.value.param == name


@pytest.mark.parametrize("model", [ScoreRequest, RerankRequest])
def test_fields_of_pairs_that_would_change_the_scores(model: type[Any]) -> None:
    for name, value in [
        ("max_tokens_per_query", 3),
        ("max_tokens_per_doc", 3),
        ("instruction", "Find the answer."),
        ("chat_template_kwargs", {"instruction": "Find the answer."}),
    ]:
        with pytest.raises(BadRequest, match="support") as refused:
            parsed(model, {**BASES[model], name: value})
        assert refused.value.param == name


def test_whole_floats_are_integers() -> None:
    found = parsed(
        CompletionRequest,
        {"prompt": [[1.0, 2]], "top_k": 40.0, "max_tokens": 3.0, "stop_token_ids": [5.0], "best_of": 1.0},
    )
    assert (found.prompt, found.top_k, found.max_tokens, found.stop_token_ids) == ([[1, 2]], 40, 3, [5])
    assert all(type(x) is int for x in (found.prompt[0][0], found.top_k, found.max_tokens, found.stop_token_ids[0]))


def test_a_users_own_json_is_left_as_it_is() -> None:
    own = {"default": None, "x": [None, 2.0], "properties": {"n": None}}
    tool = {"type": "function", "function": {"name": "f", "parameters": own, "return": own}, "cache_control": {"a": 1}}
    body = {"messages": [{**MESSAGE, "name": None}], "tools": [tool], "chat_template_kwargs": own}
    found = parsed(ChatCompletionRequest, body)
    assert found.messages == body["messages"]
    assert found.chat_template_kwargs == own
    assert msgspec.to_builtins(found.tools) == [{"type": "function", "function": tool["function"]}]


def test_unknown_fields() -> None:
    assert parsed(CompletionRequest, {"prompt": "a", "unheard_of": None}) == parsed(CompletionRequest, {"prompt": "a"})
    with pytest.raises(BadRequest, match="Did you mean 'temperature'") as refused:
        parsed(CompletionRequest, {"prompt": "a", "temperatur": 1})
    assert refused.value.param == "temperatur"
    body = {"messages": [MESSAGE], "tools": [{**TOOL, "kind": 1}], "x": {"y": 1}}
    with pytest.raises(BadRequest) as refused:
        parsed(ChatCompletionRequest, body)
    assert refused.value.param == "tools[0].kind"
    assert (
        parsed(ChatCompletionRequest, body, ignore_unknown=True).tools
        == parsed(ChatCompletionRequest, {"messages": [MESSAGE], "tools": [TOOL]}).tools
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'"\\ud800"', b"NaN", b"1e999", b"9" * 5000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match="must be a JSON object"):
        parse_model(body, CompletionRequest)


def nested(depth: int) -> bytes:
    return b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (nested(MAX_DEPTH), 400),
        (nested(200_000), 400),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        (b'{"prompt":[' + b"{}," * MAX_CONTAINERS + b"{}]}", 413),
        (b'{"prompt":[' + b"1," * (MAX_VALUES + 1) + b"1]}", 413),
        (b'{"x":{' + b",".join(b'"%d":1' % i for i in range(MAX_MEMBERS)) + b"}}", 413),
    ],
)
def test_bounds_come_before_the_parser(body: bytes, status: int) -> None:
    with pytest.raises(APIError) as refused:
        check_structure(body)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "text",
    [
        "[" * 70_000,
        '\\"[[[' * 20_000,
        "\\" * 70_001 + '"[' * 300,
        '{"a":' * 30_000,
        "]}" * 70_000,
        "é[" * 40_000,
    ],
)
def test_what_is_in_a_string_is_not_counted(text: str) -> None:
    for body in ({"prompt": text}, {text: 1}, {"a": [{}] * 200, "prompt": text}):
        check_structure(json.dumps(body, ensure_ascii=False).encode())
        check_structure(json.dumps(body).encode())
    with pytest.raises(BadRequest, match="levels deep"):
        check_structure(json.dumps({"prompt": text}).encode()[:-1] + b',"x":' + nested(MAX_DEPTH) + b"}")


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": [MESSAGE]}])
def test_an_invocation_is_scanned_and_parsed_once(body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[bytes] = []
    scan = check_structure
    monkeypatch.setattr(bodies, "check_structure", lambda data, most: scanned.append(data) or scan(data, most))

    def not_ready() -> None:
        raise Busy("The engine is starting.", 5)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    service: Any = SimpleNamespace(config=ServerConfig(), max_json_values=MAX_VALUES, check_ready=not_ready)
    http = Request({"type": "http", "method": "POST", "headers": [], "path": "/invocations"}, receive)
    with pytest.raises(Busy):
        asyncio.run(_invoke(service, http))
    assert len(scanned) == 1
    assert not hasattr(http.state, "body"), "kept no longer than it is needed"


@pytest.mark.parametrize("prompt", [[-1], [[-1]], [[1], [2, -1]]])
def test_a_bound_is_told_in_words(prompt: Any) -> None:
    with pytest.raises(BadRequest, match=r"^prompt.*: expected an integer greater than or equal to 0, found -1\.$"):
        parse_model(json.dumps({"prompt": prompt}).encode(), CompletionRequest)
