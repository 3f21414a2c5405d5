"""What a chat request's tools and forms together mean for its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sempre.engine import SamplingParams
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.server.body import parse_model
from sempre.engine.server.config import server_config
from sempre.engine.server.conversation import template_variables
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.tools import ChatPlan

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


def content(text: str, **fields: Any) -> str | None:
    """The content of an answer, read by the plan's own parser."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": [TOOL], **fields}).encode()
    request = parse_model(body, ChatCompletionRequest)
    config = server_config({"enable_auto_tool_choice": True, "tool_call_parser": "llama3_json"})
    plan = ChatPlan.of(request, config)
    tokenizer: Any = None  # nothing is decoded without a reasoning parser
    prompt = PreparedRequest("0", None, [1], SamplingParams(), [], [0], 0.0, PromptReasoning(tokenizer, [1]))
    [parser] = plan.message_parsers(prompt, tokenizer, 1)
    delta = parser.feed(text, [5])
    end, _ = parser.finish("stop")
    return "".join(part.content or "" for part in (delta, end) if part is not None)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ['{"name": "Ann", "parameters": {}}', "b"]}},
        {"structured_outputs": {"json": PERSON}},
    ],
    ids=["json_schema", "json_object", "choice", "json"],
)
def test_a_value_that_looks_like_a_call_is_the_answer(fields: dict[str, Any]) -> None:
    text = '{"name": "Ann", "parameters": {}}'
    assert content(text, **fields) == text
    # the control: without a form it is a call
    assert content(text) == ""
    # and a grammar may describe calls
    assert content(text, structured_outputs={"regex": ".*"}) == ""


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
        ({}, {}),
    ],
)
def test_no_effort_is_no_thinking(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    assert template_variables(parse_model(body, ChatCompletionRequest)) == variables
