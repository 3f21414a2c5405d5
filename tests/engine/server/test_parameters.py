"""What a request leaves out takes the value of the model's defaults, and what it gives does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sempre.engine import SamplingParams
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError
from sempre.engine.server.fields import to_model
from sempre.engine.server.parameters import chat_parameters, check_model, completion_parameters, structured_outputs
from sempre.engine.server.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest

DEFAULTS: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "presence_penalty": 1.5,
    "frequency_penalty": 0.5,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.05,
    "max_tokens": 9,
    "skip_special_tokens": False,
}
GIVEN: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.25,
    "temperature": 1.0,
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "max_tokens": 16,
    "skip_special_tokens": True,
}
Ask = Callable[..., SamplingParams]


def complete(**fields: Any) -> SamplingParams:
    request = to_model({"prompt": "It is", **fields}, CompletionRequest)
    return completion_parameters(request, SamplingParams(**DEFAULTS), ServerConfig())


def chat(**fields: Any) -> SamplingParams:
    request = to_model({"messages": [{"role": "user", "content": "Hi"}], **fields}, ChatCompletionRequest)
    return chat_parameters(request, SamplingParams(**DEFAULTS), ServerConfig())


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_request_takes_the_defaults_that_it_does_not_give(ask: Ask, name: str) -> None:
    assert {each: getattr(ask(), each) for each in DEFAULTS} == DEFAULTS
    assert ask(**{name: None}) == ask()
    changed = ask(**{name: GIVEN[name]})
    expected = {**DEFAULTS, name: max(GIVEN[name], 0)}
    assert {each: getattr(changed, each) for each in DEFAULTS} == expected


def test_the_newer_name_of_the_limit_comes_first() -> None:
    for fields, limit in (
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
        ({"max_tokens": 4, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 4, "max_completion_tokens": None}, 4),
    ):
        assert chat(**fields).max_tokens == limit


@pytest.mark.parametrize("name", [None, "", "a", "b"])
def test_no_name_and_an_empty_one_mean_the_served_model(name: str | None) -> None:
    check_model(name, ["a", "b"])
    with pytest.raises(APIError, match="The model `c` does not exist") as refusal:
        check_model("c", ["a", "b"])
    assert refusal.value.status == 404


TAG = {"begin": "<f>", "schema": {"type": "boolean"}, "end": "</f>"}
TAGS = {"type": "structural_tag", "structures": [TAG], "triggers": ["<f"]}
NEWER = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<"],
        "tags": [{"type": "tag", "begin": "<f>", "content": {"type": "regex", "pattern": "a"}, "end": ""}],
    },
}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
@pytest.mark.parametrize("tags", [TAGS, NEWER])
def test_a_format_of_tags(kind: type[GenerationRequest], tags: dict[str, Any]) -> None:
    """In either field, vLLM's two formats."""
    prompt = {"prompt": "a"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "a"}]}
    form = structured_outputs(to_model({**prompt, "response_format": tags}, kind))
    assert form is not None
    assert json.loads(str(form.structural_tag)) == tags
    fields = {**prompt, "structured_outputs": {"structural_tag": json.dumps(tags)}}
    assert structured_outputs(to_model(fields, kind)) == form
    with pytest.raises(APIError, match="is refused") as refused:
        structured_outputs(to_model({**prompt, "response_format": {**tags, "format": {}}}, kind))
    assert refused.value.param == "response_format"
