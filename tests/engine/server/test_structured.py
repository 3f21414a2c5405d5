"""Structured outputs, tool calls and reasoning, by the openai client from a real server process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_process import ServerProcess

# A prompt that ends like this has switched reasoning off.
ANSWER = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "</think>"}]
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9, "minimum": 1}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
HERMES_TEXT = (
    r'I look\.\n<tool_call>\n\{"name": "weather", "arguments": \{"city": "(Rome|Oslo)", "days": [1-9]\}\}\n</tool_call>'
    r'\n<tool_call>\n\{"name": "clock", "arguments": \{\}\}\n</tool_call>'
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    flags = ("--max-model-len", "512", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    flags += ("--reasoning-parser", "deepseek_r1")
    log_path = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log_path, *flags, environment={"OMP_NUM_THREADS": "1"}) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            yield made
        server.terminate()
        assert server.process.wait(30) == 0


def ask(client: openai.OpenAI, **keywords: Any) -> Any:
    extra = {**CONTINUED, **keywords.pop("extra_body", {})}
    settings: dict[str, Any] = {"model": "tiny", "messages": ANSWER, "seed": 5, "max_tokens": 120, **keywords}
    return client.chat.completions.create(**settings, extra_body=extra)


def streamed(client: openai.OpenAI, **keywords: Any) -> dict[str, Any]:
    """The message that the chunks of a stream add up to, by the rules of OpenAI's own documentation."""
    message: dict[str, Any] = {"content": None, "reasoning": None, "reasoning_content": None, "tool_calls": []}
    for chunk in ask(client, stream=True, **keywords):
        [choice] = chunk.choices
        delta = choice.delta.model_dump(exclude_unset=True)
        for name in ("content", "reasoning", "reasoning_content"):
            if delta.get(name):
                message[name] = (message[name] or "") + delta[name]
        for part in delta.get("tool_calls", []):
            if part["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"id": part["id"], "type": part["type"], **part["function"]})
            else:
                message["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
        message["finish_reason"] = choice.finish_reason
    return message


def whole(client: openai.OpenAI, **keywords: Any) -> dict[str, Any]:
    """A message that was not streamed, in the form of `streamed`."""
    [choice] = ask(client, **keywords).choices
    message = choice.message.model_dump()
    calls = [{"id": c["id"], "type": c["type"], **c["function"]} for c in message.get("tool_calls") or []]
    parts = {name: message.get(name) or None for name in ("content", "reasoning", "reasoning_content")}
    return {**parts, "tool_calls": calls, "finish_reason": choice.finish_reason}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls follow from the request's."""
    calls = [{name: value for name, value in call.items() if name != "id"} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def both(client: openai.OpenAI, **keywords: Any) -> dict[str, Any]:
    """The whole message, which is also the streamed one."""
    message = whole(client, **keywords)
    assert without_ids(streamed(client, **keywords)) == without_ids(message)
    return message


def json_schema(**parts: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", **parts}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema(client: openai.OpenAI, temperature: float) -> None:
    message = both(client, response_format=json_schema(schema=PERSON, strict=True), temperature=temperature)
    person = json.loads(message["content"])
    assert set(person) == {"name", "age"}
    assert 1 <= person["age"] <= 99
    assert len(person["name"]) <= 12
    assert message["finish_reason"] == "stop"


def test_json_object_begins_as_one(client: openai.OpenAI) -> None:
    assert whole(client, response_format={"type": "json_object"}, max_tokens=5)["content"].startswith("{")


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": r"[a-f]{3}-\d{2,5}!"}, r"[a-f]{3}-\d{2,5}!"),
        ({"choice": ["yes/no", "été"]}, "yes/no|été"),
        ({"grammar": 'start: ("a" | "b")~3 "c"'}, "[ab]{3}c"),
        ({"grammar": 'root ::= "x"+ "y"'}, "x+y"),
    ],
)
def test_structured_outputs(client: openai.OpenAI, structured: dict[str, Any], pattern: str) -> None:
    message = both(client, extra_body={"structured_outputs": structured}, temperature=1.0)
    assert re.fullmatch(pattern, message["content"])
    completion = client.completions.create(
        model="tiny", prompt="It is", max_tokens=60, seed=1, extra_body={"structured_outputs": structured}
    )
    assert re.fullmatch(pattern, completion.choices[0].text)


@pytest.mark.parametrize(
    ("keywords", "param"),
    [
        ({"response_format": json_schema(schema={"type": "objekt"})}, "response_format"),
        ({"response_format": json_schema()}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regexp": "a"}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"choice": ["x" * 200_000]}}}, "structured_outputs.choice"),
        ({"extra_body": {"structured_outputs": {"regex": "a"}, "ignore_eos": True}}, "ignore_eos"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}],
          "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(client: openai.OpenAI, keywords: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **keywords)
    assert refused.value.param == param
    assert ask(client, max_tokens=2).choices[0].message.content


def test_required_calls(client: openai.OpenAI) -> None:
    message = both(client, tools=[WEATHER, CLOCK], tool_choice="required", temperature=1.0)
    assert message["content"] is None
    assert message["finish_reason"] == "tool_calls"
    assert message["tool_calls"]
    for call in message["tool_calls"]:
        arguments = json.loads(call["arguments"])
        if call["name"] == "weather":
            assert arguments["city"] in ("Rome", "Oslo")
            assert 1 <= arguments["days"] <= 9
        else:
            assert (call["name"], arguments) == ("clock", {})
        assert call["id"].startswith("call_")
    assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_a_message_of_enforced_calls_has_no_text(client: openai.OpenAI, choice: Any) -> None:
    for most in (1, 120):
        keywords: dict[str, Any] = {"tools": [CLOCK], "tool_choice": choice, "max_tokens": most}
        [found] = ask(client, **keywords).choices
        assert found.message.content == ""
        chunks = [chunk.choices[0].delta.content for chunk in ask(client, stream=True, **keywords)]
        assert not any(chunks)


def test_one_call_at_most(client: openai.OpenAI) -> None:
    tools = {"tools": [WEATHER, CLOCK], "parallel_tool_calls": False}
    assert len(both(client, **tools, tool_choice="required", temperature=1.0)["tool_calls"]) == 1
    forced = {"structured_outputs": {"regex": HERMES_TEXT}}
    assert [call["name"] for call in both(client, **tools, extra_body=forced)["tool_calls"]] == ["weather"]


def test_a_named_call(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    message = both(client, tools=[CLOCK, WEATHER], tool_choice=choice)
    [call] = message["tool_calls"]
    assert call["name"] == "weather"
    assert set(json.loads(call["arguments"])) == {"city", "days"}
    assert message["finish_reason"] == "stop"


def test_calls_of_the_models_own(client: openai.OpenAI) -> None:
    """The text in which a hermes model calls tools is brought about by a grammar."""
    forced = {"structured_outputs": {"regex": HERMES_TEXT}}
    message = both(client, tools=[WEATHER, CLOCK], extra_body=forced)
    assert message["content"] == "I look.\n"
    assert [call["name"] for call in message["tool_calls"]] == ["weather", "clock"]
    assert json.loads(message["tool_calls"][0]["arguments"])["city"] in ("Rome", "Oslo")
    assert message["finish_reason"] == "tool_calls"
    untouched = whole(client, tools=[WEATHER, CLOCK], tool_choice="none", extra_body=forced)
    assert untouched["content"].count("<tool_call>") == 2
    assert untouched["finish_reason"] == "stop"


def test_reasoning(client: openai.OpenAI) -> None:
    thinking = [{"role": "user", "content": "Who?"}]
    generation = {"add_generation_prompt": True, "continue_final_message": False}
    form = {"regex": "[a-c]{3}</think>[d-f]{4}", "begins_after": "e"}
    keywords = {"messages": thinking, "extra_body": {**generation, "structured_outputs": form}}
    message = both(client, **keywords)
    assert re.fullmatch("[d-f]{4}", message["content"])
    assert re.fullmatch("[^e]*e[a-c]{3}", message["reasoning"])
    assert message["reasoning"] == message["reasoning_content"]
    keywords["extra_body"]["include_reasoning"] = False
    assert both(client, **keywords) == {**message, "reasoning": None, "reasoning_content": None}
    endless = both(client, messages=thinking, extra_body=generation, max_tokens=4)
    assert endless["content"] is None
    assert endless["reasoning"]


def test_logprobs_are_those_of_the_raw_logits(client: openai.OpenAI) -> None:
    """As in vLLM: the grammar changes what is sampled, and not what is reported."""
    free = ask(client, max_tokens=1, logprobs=True, top_logprobs=3, temperature=0.0)
    forced = {"structured_outputs": {"choice": ["zebra"]}}
    bound = ask(client, max_tokens=1, logprobs=True, top_logprobs=3, temperature=0.0, extra_body=forced)
    assert bound.choices[0].message.content.startswith("z")
    tops = [answer.choices[0].logprobs.content[0].top_logprobs for answer in (free, bound)]
    assert [(t.token, t.logprob) for t in tops[0]] == [(t.token, t.logprob) for t in tops[1]]
    assert bound.choices[0].logprobs.content[0].logprob < tops[0][0].logprob
