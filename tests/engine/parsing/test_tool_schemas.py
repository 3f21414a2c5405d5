"""The schemas of enforced calls, against what the grammar then allows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from grammars import TINY
from llguidance import LLMatcher, LLTokenizer

from sempre.engine.parsing import named_call_schema, required_calls_schema

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
POINT = {"$ref": "#/$defs/point", "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}}}}
TOKENIZER = LLTokenizer((TINY / "tokenizer.json").read_text(), eos_token=[0, 2])


def accepts(schema: dict[str, Any], value: object) -> bool:
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    assert not matcher.get_error()
    tokens = TOKENIZER.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def call(name: str, **parameters: object) -> dict[str, object]:
    return {"name": name, "parameters": parameters}


def test_required() -> None:
    schema = required_calls_schema([("weather", WEATHER), ("time", None), ("plot", POINT)], parallel=True)
    assert accepts(schema, [call("weather", city="Rome")])
    assert accepts(schema, [call("time"), call("weather", city="Rome"), call("plot", x=1)])
    for refused in (
        [],
        [call("other")],
        [call("weather")],
        [call("time", zone=1)],
        [call("plot", x="1")],
        call("time"),
    ):
        assert not accepts(schema, refused), refused


def test_one_call() -> None:
    schema = required_calls_schema([("time", None)], parallel=False)
    assert accepts(schema, [call("time")])
    assert not accepts(schema, [call("time"), call("time")])


def test_named() -> None:
    assert accepts(named_call_schema(WEATHER), {"city": "Rome"})
    assert not accepts(named_call_schema(WEATHER), {"town": 1})
    assert accepts(named_call_schema(None), {})


def test_definitions_that_differ_are_refused() -> None:
    other = {"$ref": "#/$defs/point", "$defs": {"point": {"type": "string"}}}
    with pytest.raises(ValueError, match=r"\$defs/point is defined twice"):
        required_calls_schema([("a", POINT), ("b", other)], parallel=True)
