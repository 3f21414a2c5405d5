"""/v1/messages with Anthropic's own client, against a model that calls tools as a script says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from scripted_agent_server import scripted_agent
from server_process import ServerProcess

TOOLS: Any = [
    {
        "name": "weather",
        "description": "The weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    {"name": "clock", "input_schema": {"type": "object", "properties": {}}, "cache_control": {"type": "ephemeral"}},
]
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "messages": [{"role": "user", "content": "What weather?"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    key = {"x-api-key": "secret"}
    with scripted_agent(tmp_path_factory.mktemp("messages"), "--api-key", "secret", headers=key) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as made:
        yield made


def run_tool(call: Any) -> str:
    return f"{call.input['city']}: rain" if call.name == "weather" else "noon"


def told(message: Any) -> list[dict[str, Any]]:
    return [block.model_dump(exclude_none=True) for block in message.content]


def loop(client: anthropic.Anthropic, *, seed: int, stream: bool) -> list[Any]:
    """The answers of an agent that runs the tools until the model calls none."""
    messages: list[Any] = list(ASK["messages"])
    answers = []
    while True:
        fields: dict[str, Any] = {**ASK, "messages": messages, "tools": TOOLS, "extra_body": {"seed": seed}}
        if stream:
            with client.messages.stream(**fields) as events:
                answer: Any = events.get_final_message()
        else:
            answer = client.messages.create(**fields)
        answers.append(answer)
        if answer.stop_reason != "tool_use":
            return answers
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": run_tool(block)}
            for block in answer.content
            if block.type == "tool_use"
        ]
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]


def test_a_loop_of_tools_is_the_same_streamed_or_not_and_again(client: anthropic.Anthropic) -> None:
    whole = loop(client, seed=7, stream=False)
    kinds = [[block.type for block in answer.content] for answer in whole]
    assert kinds == [["thinking", "text", "tool_use", "tool_use"], ["thinking", "tool_use"], ["thinking", "text"]]
    assert [answer.stop_reason for answer in whole] == ["tool_use", "tool_use", "end_turn"]
    first, second = whole[0].content[2:], whole[1].content[1]
    assert (first[0].input["days"], first[1].input) == ([1, 2.5], {})
    assert (
        whole[2].content[1].text == f"\n\nI found: {first[0].input['city']}: rain; noon; {second.input['city']}: rain."
    )
    assert {answer.seed for answer in whole} == {7}
    for again in (loop(client, seed=7, stream=True), loop(client, seed=7, stream=False)):
        # the ids of calls, too: they are part of the next prompt
        assert [told(answer) for answer in again] == [told(answer) for answer in whole]
        assert [answer.usage.output_tokens for answer in again] == [answer.usage.output_tokens for answer in whole]
    other = loop(client, seed=8, stream=False)
    assert [told(answer) for answer in other] != [told(answer) for answer in whole]


def events(server: ServerProcess, **fields: Any) -> list[tuple[str, Any]]:
    answer = server.http.post("/v1/messages", json={**ASK, **fields, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    found = []
    for block in blocks:
        event, data = block.split("\n")
        assert event.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_the_events_of_a_stream_are_anthropics(server: ServerProcess) -> None:
    found = events(server, tools=TOOLS, seed=7)
    assert [kind for kind, _ in found[:2]] == ["message_start", "ping"]
    assert [kind for kind, _ in found[-2:]] == ["message_delta", "message_stop"]
    assert found[0][1]["message"]["content"] == []
    assert found[0][1]["message"]["usage"]["output_tokens"] == 0
    open_block = None
    for kind, event in found[2:-2]:
        if kind == "content_block_start":
            assert open_block is None
            open_block = event["index"]
        elif kind in ("content_block_delta", "content_block_stop"):
            assert event["index"] == open_block
            open_block = None if kind == "content_block_stop" else open_block
        else:
            assert kind == "ping"
    assert open_block is None
    deltas = [event["delta"] for kind, event in found if kind == "content_block_delta"]
    assert next(d["partial_json"] for d in deltas if d["type"] == "input_json_delta").endswith('"days": [1, 2.50]}')
    assert found[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    whole = server.http.post("/v1/messages", json={**ASK, "tools": TOOLS, "seed": 7}).json()
    assert found[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert whole["usage"]["output_tokens_details"]["thinking_tokens"] > 0


def test_a_long_call_is_told_at_once_and_pings_come_meanwhile(server: ServerProcess) -> None:
    found = events(server, messages=[{"role": "user", "content": "[long]"}], tools=TOOLS, seed=7)
    kinds = [kind for kind, _ in found]
    begun = kinds.index("content_block_start")
    assert kinds[2:begun] == ["ping"] * (begun - 2) != []
    assert kinds[begun:-2] == ["content_block_start", "content_block_delta", "content_block_stop"]
    assert json.loads(found[begun + 1][1]["delta"]["partial_json"]) == {"of": list(range(60))}


def prompt_tokens(client: anthropic.Anthropic, messages: Any, **fields: Any) -> int:
    return client.messages.count_tokens(model="tiny", messages=messages, **fields).input_tokens


def test_counted_tokens_are_those_of_the_prompt(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"system": [{"type": "text", "text": "Be brief."}], "tools": TOOLS}
    usage = client.messages.create(**ASK, **fields).usage
    whole = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert prompt_tokens(client, ASK["messages"], **fields) == whole
    again = client.messages.create(**ASK, **fields).usage
    assert again.cache_read_input_tokens
    assert again.input_tokens + again.cache_read_input_tokens == whole


def test_an_answer_may_be_begun_and_cut(client: anthropic.Anthropic) -> None:
    begun: Any = [*ASK["messages"], {"role": "assistant", "content": "It is"}]
    assert prompt_tokens(client, begun) < prompt_tokens(client, [*begun, {"role": "user", "content": "?"}])
    cut = client.messages.create(**{**ASK, "max_tokens": 3})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    stopped = client.messages.create(**ASK, stop_sequences=["city"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "city")
    assert told(stopped) == [{"type": "text", "text": "No tools, "}]


@pytest.mark.parametrize(("fields", "is_told"), [({}, True), ({"display": "omitted"}, False)])
def test_thinking_may_be_omitted(client: anthropic.Anthropic, fields: Any, is_told: bool) -> None:
    thinking: Any = {"type": "adaptive", **fields}
    answer = client.messages.create(**ASK, tools=TOOLS, thinking=thinking)
    assert any(block.type == "thinking" for block in answer.content) is is_told


def test_a_call_that_is_no_json_says_so(client: anthropic.Anthropic) -> None:
    fields: Any = {
        **ASK,
        "messages": [{"role": "user", "content": "[broken]"}],
        "tools": TOOLS,
        "extra_body": {"seed": 7},
    }
    whole = client.messages.create(**fields)
    call = whole.content[-1]
    assert call.type == "tool_use"
    assert list(call.input) == ["INVALID_JSON"]
    with client.messages.stream(**fields) as stream:
        assert told(stream.get_final_message()) == told(whole)


def test_tool_choices(client: anthropic.Anthropic) -> None:
    none = client.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "none"})
    assert not any(block.type == "tool_use" for block in none.content)
    one = client.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.name for block in one.content if block.type == "tool_use"] == ["weather"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]}, "redacted"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nobody"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop_sequences"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"temperature": -1}, "temperature"),
        ({"tempreature": 1}, "temperature"),
        ({"container": "abc"}, "container"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"speed": "fast"}, "speed"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "output_config.format"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}]},
            "messages[0]",
        ),
        (
            {
                "messages": [
                    *ASK["messages"],
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "clock", "input": {}}]},
                ]
            },
            "messages",
        ),
    ],
)  # fmt: skip
def test_what_is_not_built_is_named(server: ServerProcess, fields: dict[str, Any], named: str) -> None:
    for more in ({}, {"stream": True}):
        answer = server.http.post("/v1/messages", json={**ASK, **fields, **more})
        body = answer.json()
        assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
        assert named in body["error"]["message"]


def test_neutral_fields_and_nulls_change_nothing(server: ServerProcess) -> None:
    base = {**ASK, "tools": TOOLS, "seed": 3}
    expected = server.http.post("/v1/messages", json=base).json()["content"]
    neutral = {
        "metadata": {"user_id": "me"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"},
        "speed": "standard", "mcp_servers": [], "inference_geo": "eu",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "adaptive"}, "tool_choice": {"type": "auto"},
        **dict.fromkeys(["system", "stop_sequences", "top_p", "top_k", "container", "output_config"]),
    }  # fmt: skip
    message = {"role": "user", "content": [{**ASK["messages"][0], "type": "text", "text": "What weather?"}]}
    del message["content"][0]["role"], message["content"][0]["content"]  # type: ignore[index]
    message["content"][0]["cache_control"] = {"type": "ephemeral"}  # type: ignore[index]
    answer = server.http.post("/v1/messages?beta=true", json={**base, **neutral, "messages": [message]})
    assert answer.json()["content"] == expected


def test_headers_and_other_errors(server: ServerProcess) -> None:
    def ask(path: str = "/v1/messages", **headers: str) -> tuple[int, str]:
        answer = server.http.post(path, json=ASK, headers=headers)
        body = answer.json()
        return answer.status_code, body.get("error", body)["type"]

    assert ask() == ask(**{"anthropic-version": "2023-06-01"}) == (200, "message")
    assert ask(**{"anthropic-version": "2022-01-01"}) == (400, "invalid_request_error")
    assert ask(**{"x-api-key": "wrong"}) == (401, "authentication_error")
    assert ask(**{"x-api-key": "wrong", "authorization": "Bearer secret"}) == (200, "message")
    assert ask("/v1/messages/batches") == (404, "not_found_error")
    assert ask(**{"content-type": "text/plain"}) == (415, "invalid_request_error")
    unknown = server.http.post("/v1/messages", json={**ASK, "model": "claude"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")


def test_a_tool_that_failed_and_a_turn_in_parts(client: anthropic.Anthropic) -> None:
    """Turns in a row of one role are one; a failed tool is an error that the model reads."""
    call: Any = {"type": "tool_use", "id": "x", "name": "clock", "input": {}}
    results = [
        {"type": "tool_result", "tool_use_id": "x", "content": "broken", "is_error": True},
        {"type": "tool_result", "tool_use_id": "x"},
        {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "a"}]},
        {"type": "text", "text": "Go on."},
    ]
    parts: Any = [*ASK["messages"], {"role": "assistant", "content": [call]}]
    parts += [{"role": "user", "content": [each]} for each in results]
    answer = client.messages.create(**{**ASK, "messages": parts}, tools=TOOLS)
    assert told(answer)[-1]["text"] == "\n\nI found: Error: broken; ; a."
    joined: Any = [*parts[:2], {"role": "user", "content": results}]
    assert prompt_tokens(client, parts) == prompt_tokens(client, joined)
