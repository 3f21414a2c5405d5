"""Schemas of many shapes: what is accepted allows nothing that the schema forbids, what is refused says why."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import schema_corpus
from llguidance import LLMatcher, LLParserLimits

from sempre.engine import StructuredOutputsParams
from sempre.engine.frontend.grammars import GrammarBuilder, byte_tokenizer
from sempre.engine.frontend.schema_bounds import add_bounds
from sempre.engine.frontend.schemas import rewritten
from sempre.engine.models.resolve import resolve_model
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError

BUILDER = GrammarBuilder(Tokenizer.from_folder(resolve_model("tiny").path))
END = 256


def grammar_of(schema: dict[str, Any], max_tokens: int = 200, **options: Any) -> str:
    return BUILDER.build(StructuredOutputsParams(json=schema, **options), 4096, [0, 2], max_tokens)


def matcher_of(schema: dict[str, Any], max_tokens: int = 200, **options: Any) -> LLMatcher:
    limits = LLParserLimits(verbose_errors=False)
    return LLMatcher(byte_tokenizer(), grammar_of(schema, max_tokens, **options), log_level=0, limits=limits)


def accepts(schema: dict[str, Any], value: object, max_tokens: int = 10**6, **options: Any) -> bool:
    return accepts_text(schema, json.dumps(value), max_tokens, **options)


def accepts_text(schema: dict[str, Any], text: str, max_tokens: int = 10**6, **options: Any) -> bool:
    matcher = matcher_of(schema, max_tokens, **options)
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


def written(schema: dict[str, Any], seed: int, most: int = 4000) -> str | None:
    """A text that the grammar allows, by a writer that closes early; None when it is too long."""
    generator = random.Random(seed)
    matcher = matcher_of(schema)
    text = bytearray()
    while len(text) < most:
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        assert not matcher.is_error(), matcher.get_error()
        closing = [byte for byte in allowed.tolist() if byte == END or chr(byte) in '"}]']
        byte = generator.choice(closing if closing and generator.random() < 0.7 else allowed.tolist())
        if byte == END:
            return text.decode(errors="replace")
        assert matcher.consume_token(byte)
        text.append(byte)
    return None


def check(indices: range) -> Counter[str]:
    """Try schemas; return how many of each shape were refused."""
    refused: Counter[str] = Counter()
    for index in indices:
        schema = schema_corpus.schema(index)
        shape = schema_corpus.SHAPES[index % len(schema_corpus.SHAPES)].__name__
        try:
            text = written(schema, index)
        except RequestError:
            refused[shape] += 1
            continue
        if text is not None:
            plain = {word: value for word, value in schema.items() if word != "$schema"}
            assert jsonschema_rs.is_valid(_modern(plain), json.loads(text)), (index, schema, text)
    return refused


def _modern(schema: Any) -> Any:
    """In the words of the draft that the validator takes; of `oneOf` is asked what a grammar can hold, `anyOf`."""
    if isinstance(schema, list):
        return [_modern(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {{"oneOf": "anyOf"}.get(word, word): _modern(value) for word, value in schema.items()}
    if isinstance(made.get("items"), list):
        made["prefixItems"] = made.pop("items")
    if made.get("exclusiveMinimum") is True:
        made["exclusiveMinimum"] = made.pop("minimum")
    if isinstance(made.get("$id"), str) and made["$id"].startswith("#"):
        made["$anchor"] = made.pop("$id")[1:]
    return made


def test_a_covering_part_of_the_corpus() -> None:
    refused = check(range(66))
    assert refused == {"beyond": 6}


@pytest.mark.product
def test_the_whole_corpus() -> None:
    refused = check(range(schema_corpus.NUM_SCHEMAS))
    assert set(refused) <= {"beyond"}, refused


BIG = 2**53 + 1


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "integer", "minimum": BIG}, [BIG + 1, 10**17], [BIG - 1, 0]),
        ({"type": "integer", "exclusiveMinimum": BIG - 1}, [BIG + 1], [BIG - 1]),
        ({"type": "integer", "maximum": -BIG}, [-BIG - 1], [-BIG + 1]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [2**62, -(2**62), 0, 2**63 - 1],
         [2**63, 2**63 + 1, -(2**63) - 1]),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [0, 2**63 - 1], [-1, 2**64]),
        ({"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}, [2**63 - 1], [2**63]),
        ({"type": "integer", "minimum": 2**53, "maximum": 2**53 + 2}, [2**53, 2**53 + 1, 2**53 + 2],
         [2**53 - 1, 2**53 + 3]),
        ({"type": "array", "minItems": 1.0, "maxItems": 2.0}, [[1], [1, 2]], [[], [1, 2, 3]]),
        ({"type": ["integer", "null"], "minimum": BIG}, [BIG + 1, None], [BIG - 1]),
        ({"type": "number", "minimum": -1.7e308, "maximum": 1.7e308}, [0.5, -3, 1e15], []),
        ({"type": "number", "minimum": BIG}, [BIG + 1], [BIG - 1]),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
        ({"type": "string", "format": "phone"}, ["a"], [1]),
        ({"type": "string", "format": []}, ["a"], [1]),
        ({"type": "string", "format": {"a": 1}}, ["a"], [1]),
        ({"type": "string", "format": "date"}, ["2026-01-31"], ["a"]),
        ({"type": "string", "format": "email"}, ["a@b.com", "a" * 64 + "@b.com"], ["a" * 65 + "@b.com"]),
        ({"type": "string", "format": "hostname"}, ["b.com"], [".".join(["a" * 60] * 5)]),
        ({"minimum": 3, "exclusiveMinimum": -(2**64), "type": "number"}, [3, 4], [2, -1]),
        ({"maximum": 0, "exclusiveMaximum": 2**64, "type": "number"}, [0, -1], [1]),
        ({"maximum": 0, "exclusiveMaximum": -(2**53), "type": "number"}, [-(2**53) - 2], [-1, 0]),
        ({"minimum": 2**64}, ["a", None, [1]], [1]),
        ({"allOf": [{"type": "array", "maxItems": 3}, {"type": "array", "maxItems": 1}]}, [[1]], [[1, 2]]),
        ({"allOf": [{"type": "integer", "minimum": 3, "maximum": 9}, {"minimum": 5}, {"maximum": 7}]}, [5, 7], [4, 8]),
        ({"allOf": [{"type": "number", "multipleOf": 7}, {"minimum": 5}]}, [7, 14], [7.5, 0, 8]),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"],
          "anyOf": [{"properties": {"b": {"type": "null"}}, "additionalProperties": False}, {"required": ["c"]}]},
         [{"a": None, "c": 1}], [{"a": None}, {"a": None, "b": None}]),
        ({"type": "object", "properties": {"a": False, "b": True}}, [{}, {"b": 1}], [{"a": 1}]),
        ({"type": "array", "prefixItems": [True, False]}, [[], [1]], [[1, 2]]),
        ({"type": "array", "items": False}, [[]], [[1]]),
        ({"anyOf": [False, {"type": "null"}]}, [None], [1]),
        ({"type": "null", "anyOf": [True, {"type": "string"}]}, [None], ["a"]),
        ({"type": "null", "allOf": [True]}, [None], [1]),
        ({"type": "object", "patternProperties": {"^a": False}}, [{"b": 1}], [{"a": 1}]),
        ({"type": "object", "dependentSchemas": {"a": False}}, [{"b": 1}], [{"a": 1}]),
        ({"type": "null", "not": False}, [None], [1]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1, 1.5], ["a"]),
        ({"const": 2**60}, [2**60], [2**60 + 1]),
        ({"properties": {"a": {"type": "object", "required": True}}, "type": "object"}, [{"a": {}}], [{}]),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
         [{}, {"a": 1, "b": 2}, {"b": 2}], [{"a": 1}]),
        ({"type": "object", "not": {"required": ["a"]}}, [{"b": 1}], [{"a": 1}]),
        ({"not": {"type": ["string", "null"]}}, [1, [1], True], ["a", None]),
        ({"enum": [1, 2, 3], "not": {"const": 2}}, [1, 3], [2]),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, [{"a": 1}, {"b": 1}], [{}]),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}]),
        ({"$ref": "#/x/y", "x": {"y": {"type": "integer", "format": "int64", "minimum": BIG}}}, [BIG + 1], [BIG - 1]),
        ({"$id": "https://example.com/r", "$ref": "https://example.com/r#/x/y",
          "x": {"y": {"type": "integer", "format": "int64", "minimum": BIG}}}, [BIG + 1], [BIG - 1]),
        ({"$id": "https://example.com/r", "$ref": "r#/x", "x": {"type": "string", "format": "phone"}}, ["a"], [1]),
        ({"$ref": "#short", "x": 1, "$defs": {"a": {"$anchor": "short", "type": "string", "format": "phone"}}}, ["a"],
         [1]),
        ({"$ref": "#short", "definitions": {"a": {"id": "#short", "type": "integer"}}}, [1], ["a"]),
        ({"$id": "https://example.com/a/b", "$ref": "c#/$defs/d", "$defs": {
            "d": {"type": "null"}, "e": {"$id": "c", "$defs": {"d": {"type": "integer", "minimum": BIG}}}}},
         [BIG + 1], [BIG - 1, None]),
        ({"$ref": "urn:of:us", "$defs": {"d": {"type": "null"}, "e": {
            "$id": "urn:of:us", "$ref": "#/$defs/d", "$defs": {"d": {"type": "boolean"}}}}}, [True], [None]),
        ({"$ref": "c", "$defs": {"e": {"$id": "c", "type": "array", "items": {"$ref": "#f"}, "$defs": {"g": {
            "$anchor": "f", "type": "string", "format": "phone"}}}}}, [["a"]], [[1]]),
        ({"$ref": "#/items/0", "items": [{"type": "string"}]}, ["a"], [1]),
        ({"$ref": "#/$defs/of%20a~1b%25", "$defs": {"of a/b%": {"type": "string"}}}, ["a"], [1]),
        ({"$ref": "#/$defs/a", "$defs": {"a": True}}, ["a", 1], []),
        ({"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, [[1]], [[1, 2], ["a"]]),
        ({"unevaluatedProperties": False, "properties": {"a": {}}, "type": "object"}, [{"a": 1}], [{"b": 1}]),
    ],
)  # fmt: skip
def test_what_a_schema_means(schema: dict[str, Any], inside: list[Any], outside: list[Any]) -> None:
    assert all(accepts(schema, value) for value in inside)
    assert not any(accepts(schema, value) for value in outside)


U64 = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
OVER = {"type": "integer", "minimum": BIG}


@pytest.mark.parametrize("max_tokens", [200, 10**6])
@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "integer", "minimum": BIG, "maximum": BIG}, [BIG], [BIG - 1, BIG + 1]),
        ({"type": "integer", "minimum": 2**63}, [2**63, 2**63 + 1], [2**63 - 1]),
        ({"type": "integer", "exclusiveMinimum": -BIG - 1, "exclusiveMaximum": BIG + 1}, [-BIG, BIG, 0],
         [-BIG - 1, BIG + 1]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [-(2**63), 2**63 - 1],
         [-(2**63) - 1, 2**63]),
        (U64, [0, 2**63, 2**64 - 1], [-1, 2**64]),
        ({**U64, "x-exact-range": {"low": "7", "high": "8"}}, [0, 9], [-1]),
        ({"const": -(2**63)}, [-(2**63)], [-(2**63) + 1]),
        ({"type": "integer", "const": BIG}, [BIG], [BIG - 1, BIG + 1]),
        ({"enum": [BIG, 1, None]}, [BIG, 1, None], [BIG - 1, BIG + 1, 2]),
        ({"type": ["integer", "null"], "minimum": BIG}, [BIG, None], [BIG - 1, 0]),
        ({"type": "number", "minimum": BIG}, [BIG, BIG + 1], [BIG - 1, 0.5]),
        ({"minimum": BIG}, [BIG, "a", [1], {"b": 1}, None, True], [BIG - 1]),
        ({"type": "integer", "minimum": BIG, "maximum": 2**62, "multipleOf": 3}, [BIG, BIG + 3, 2**62 - 1],
         [BIG + 1, BIG - 3]),
        ({"type": "object", "properties": {"a": U64, "b": {"type": "string"}, "c": OVER}, "required": ["a"]},
         [{"a": 2**64 - 1}, {"a": 1, "b": "x", "c": BIG}, {"a": 1, "c": BIG}],
         [{"a": 2**64}, {"b": "x"}, {"a": 1, "c": BIG - 1}]),
        ({"type": "object", "properties": {"a": U64}}, [{}, {"a": 2**64 - 1}], [{"a": -1}]),
        ({"type": "object", "properties": {"a": U64, "b": False}, "required": ["a"], "additionalProperties": True},
         [{"a": 2**64 - 1}, {"a": 5, "c": [1]}, {"a": 5, "aa": 1}], [{"a": 2**64}, {"a": 5, "b": 1}, {"c": 1}]),
        ({"type": "object", "properties": {"a": U64, "b": U64}, "additionalProperties": U64},
         [{}, {"b": 2**64 - 1}, {"a": 1, "b": 2, "c": 2**64 - 1}], [{"b": 2**64}, {"a": 1, "b": 2, "c": 2**64}]),
        ({"type": "object", "properties": {"a": U64, "b": {"$ref": "#/properties/a"}}, "additionalProperties": U64},
         [{"b": 1}, {"a": 1, "b": 2, "c": 3}], [{"b": -1}, {"a": 1, "b": 2, "c": 2**64}]),
        ({"type": "object", "additionalProperties": U64}, [{}, {"x": 2**64 - 1, "y": 0}], [{"x": 2**64}]),
        ({"type": "object", "additionalProperties": U64, "minProperties": 1, "maxProperties": 2},
         [{"x": 2**64 - 1}, {"x": 1, "y": 2**64 - 1}], [{}, {"x": 1, "y": 1, "z": 1}]),
        ({"type": "array", "items": U64}, [[], [2**64 - 1, 2]], [[2**64]]),
        ({"type": "array", "items": U64, "minItems": 1, "maxItems": 2}, [[1], [2**64 - 1, 2]], [[], [1, 2, 3]]),
        ({"type": "array", "prefixItems": [{"type": "string"}, U64], "items": False}, [[], ["a"], ["a", 2**64 - 1]],
         [[2**64 - 1], ["a", 2**64], ["a", 1, 1]]),
        ({"type": "array", "prefixItems": [{"type": "string"}, U64], "minItems": 2}, [["a", 2**64 - 1]], [["a"], []]),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/u"}], "$defs": {"u": U64}}, [None, 2**64 - 1], [2**64]),
        ({"type": "object", "properties": {"v": U64, "next": {"$ref": "#"}}, "required": ["v"]},
         [{"v": 2**64 - 1, "next": {"v": 3, "next": {"v": 2**64 - 1}}}], [{"v": 1, "next": {}}]),
    ],
)  # fmt: skip
def test_numbers_of_any_size_are_exact(
    schema: dict[str, Any], inside: list[Any], outside: list[Any], max_tokens: int
) -> None:
    assert [value for value in inside if not accepts(schema, value, max_tokens)] == []
    assert [value for value in outside if accepts(schema, value, max_tokens)] == []


def test_white_space_about_exact_numbers() -> None:
    schema = {"type": "object", "properties": {"a": U64, "b": {"type": "array"}}, "required": ["a"]}
    assert accepts_text(schema, '{ "a" :\n\n1 , "b": [ 1 , 2 ] }')
    assert not accepts_text(schema, '{   "a":1}')
    assert not accepts_text(schema, '{ "a":1}', disable_any_whitespace=True)
    assert accepts_text(schema, '{"a":1,"b":[1,2]}', disable_any_whitespace=True)
    assert accepts_text(schema, '{     "a":1}', whitespace_pattern=" {5}")
    spaced = {**schema, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    assert accepts_text(spaced, '{"a": 1, "b": [1, 2]}')
    assert not accepts_text(spaced, '{"a":1}')


@pytest.mark.parametrize(
    "wrong",
    [
        {"x-guidance": 5},
        {"x-guidance": {"item_separator": 5}},
        {"prefixItems": "ab"},
        {"required": 5},
        {"minProperties": "a"},
        {"patternProperties": {"(": {}}, "additionalProperties": False},
    ],
)
def test_what_is_no_schema_about_exact_numbers_is_refused(wrong: dict[str, Any]) -> None:
    kind = "array" if "prefixItems" in wrong else "object"
    schema = {"type": kind, "items": U64, "properties": {"a": U64}, **wrong}
    with pytest.raises(RequestError, match=r"structured_outputs\.json is refused: "):
        grammar_of(schema)


def test_copies_for_exact_numbers_are_bounded() -> None:
    large = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    properties = {f"k{i}": {"$ref": "#/$defs/large"} for i in range(900)}
    schema = {"type": "object", "properties": {**properties, "a": U64}, "$defs": {"large": large}}
    assert "json_schema" in json.loads(grammar_of(schema))["grammars"][0]


def test_bounds_beyond_float64_in_random_places() -> None:
    generator = random.Random(3)
    for _ in range(40):
        power = generator.choice([54, 60, 63, 64, 80])
        low, high = sorted(generator.choice([-1, 1]) * generator.randrange(2**53, 2**power) for _ in range(2))
        schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
        depth = generator.randrange(3)
        wraps = [generator.choice(["array", "object", "anyOf"]) for _ in range(depth)]
        for wrap in wraps:
            if wrap == "array":
                schema = {"type": "array", "items": schema}
            elif wrap == "object":
                schema = {"type": "object", "properties": {"k": schema}}
            else:
                schema = {"anyOf": [{"type": "boolean"}, schema]}
        for end, step in ((low, -1), (high, 1)):
            for value, is_inside in ((end, True), (end - step, True), (end + step, False)):
                whole: Any = value
                for wrap in wraps:
                    whole = [whole] if wrap == "array" else {"k": whole} if wrap == "object" else whole
                assert accepts(schema, whole) == is_inside, (schema, whole)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, "no text fulfils it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no text fulfils"),
        ({"properties": {"a": {"not": {"pattern": "b"}}}}, "/properties/a: not: "),
        ({"$ref": "#/$defs/a", "$defs": {"a": False}}, "schema is false"),
        ({"$ref": "other.json"}, "other.json"),
        ({"$ref": "c", "$defs": {"e": {"$id": "c", "$ref": "#/$defs/e"}}}, "Resource 'json-schema:///c'"),
        ({"allOf": [{"type": "number", "multipleOf": 4093}, {"multipleOf": 4096}]}, "follows at most 8192 remainders"),
        ({"allOf": [False]}, "schema is false"),
        ({"not": True}, "not: "),
        ({"const": [BIG]}, f"the value {BIG} is beyond"),
        ({"enum": [[{"a": 10**30}]]}, "is beyond"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "any"}, "type must be one of"),
        (
            {"type": "object", "patternProperties": {"^x": {"type": "null"}, "^x.{30}": {"type": "boolean"}}},
            "are not disjoint",
        ),
        ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if: no grammar can enforce it"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"type": "integer", "minimum": BIG + 1, "maximum": BIG}, f"minimum {BIG + 1} is greater than maximum {BIG}"),
        ({"type": "integer", "minimum": 2**63, "multipleOf": 3}, "beyond what a grammar can represent"),
        (
            {"allOf": [{"type": "integer", "minimum": 2**63}, {"type": "integer"}]},
            "beyond what a grammar can represent",
        ),
        ({"type": "integer", "minimum": "5"}, "minimum must be a number"),
        ({"properties": {"a": 5}}, "refused"),
        ({"allOf": 5}, "refused"),
    ],
)
def test_refusals_say_where_and_why(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json is refused: ") as refused:
        grammar_of(schema)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "the schema: properties may have at most 1000 .* 1001"),
        (
            {"items": {"anyOf": [{"minimum": i} for i in range(501)]}},
            "/items: anyOf may have at most 500 .* 501",
        ),
        ({"type": "object", "required": [f"p{i}" for i in range(2000)]}, "required may have at most 1000 .* 2000"),
        (
            {"type": "object", "minProperties": 1, "properties": {f"p{i}": {"type": "null"} for i in range(600)}},
            "anyOf may have at most 500 .* 600|allOf may have",
        ),
    ],
)
def test_what_takes_too_much_is_refused_before_it_is_compiled(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        grammar_of(schema)


@pytest.mark.parametrize("leaf", ["a0", "a40"])
def test_references_that_multiply_cost_no_more_than_others(leaf: str) -> None:
    """2^40 parts; each is visited from each side once."""
    step = 1 if leaf == "a40" else -1
    twice = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + step}"}] * 2} for i in range(41) if f"a{i}" != leaf}
    root = "a0" if leaf == "a40" else "a40"
    schema = {"$ref": f"#/$defs/{root}", "$defs": {**twice, leaf: {"type": "object", "properties": {"a": {}}}}}
    made, nodes = rewritten(json.loads(json.dumps(schema)))
    add_bounds(made, nodes, 200)
    assert len(json.dumps(made)) < 100_000


def test_white_space() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert accepts_text(schema, '{ "a" :\n\n1 }')
    assert not accepts_text(schema, '{   "a":1}')
    assert not accepts_text(schema, '{ "a":1}', disable_any_whitespace=True)
    assert accepts_text(schema, '{"a":1}', disable_any_whitespace=True)
    assert accepts_text(schema, '{     "a":1}', whitespace_pattern=" {5}")
    assert not accepts_text(schema, '{\n"a":1}', whitespace_pattern=" {5}")


def test_any_object() -> None:
    form = StructuredOutputsParams(json_object=True)
    grammar = BUILDER.build(form, 4096, [0, 2], 200)
    assert json.loads(grammar)["grammars"][0]["json_schema"]["type"] == "object"


def test_objects_may_be_closed() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    assert accepts(schema, {"a": {"b": 1, "c": 2}})
    assert not accepts(schema, {"a": {"b": 1, "c": 2}}, disable_additional_properties=True)
    assert accepts({**schema, "additionalProperties": True}, {"z": 1}, disable_additional_properties=True)


def test_free_parts_end_within_the_limit() -> None:
    digits = {"type": "integer"}
    assert accepts_text(digits, "9" * 18, 200)
    assert not accepts_text(digits, "9" * 20, 200)
    assert not accepts({"type": "string"}, "a" * 600, 200)
    assert accepts({"type": "string"}, "a" * 600, 2000)
    assert accepts({"type": "string", "maxLength": 1000}, "a" * 1000, 200)
    for free in ({}, {"type": "object"}, {"type": "array"}):
        assert not accepts(free, [0] * 300 if free != {"type": "object"} else {f"k{i}": 0 for i in range(300)}, 200)
        assert accepts(free, [0, "a"] if free != {"type": "object"} else {"k": [0, {"x": "a"}]}, 200)
    assert not accepts_text({"type": "number"}, "0." + "1" * 40, 200)


CAT = {"type": "object", "properties": {"k": {"const": "cat"}}, "required": ["k"]}
DOG = {"type": "object", "properties": {"k": {"const": "dog"}}, "required": ["k"]}
NEW = {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}


@pytest.mark.parametrize(
    ("schema", "inside", "endless"),
    [
        ({"$ref": "#/components/schemas/P", "components": {"schemas": {"P": CAT}}}, {"k": "cat"}, {"k": "cat", "z": 1}),
        ({"discriminator": {"propertyName": "k"}, "oneOf": [CAT, DOG]}, {"k": "dog"}, {"k": "dog", "z": 1}),
        ({"x-go-type": "T", "type": "object", "anyOf": [CAT, DOG]}, {"k": "dog"}, {"k": "dog", "z": 1}),
        ({"unheard": ["of"], "$ref": "#/$defs/C", "$defs": {"C": CAT}}, {"k": "cat"}, {"k": "cat", "z": 1}),
        ({"x-any": 1}, [0, {"x": "a"}], [0] * 300),
        ({"anyOf": [{"x-any": 1}, {"type": "null"}]}, [0, {"x": "a"}], [0] * 300),
        ({"allOf": [NEW, CAT]}, {"id": 1, "k": "cat"}, {"id": 1, "k": "cat", "z": 1}),
        ({"allOf": [{"$ref": "#/$defs/N"}, {"properties": {"x": {}}}], "$defs": {"N": NEW}}, {"id": 1, "x": [2]},
         {"id": 1, "x": [0] * 300}),
        ({"$ref": "#/$defs/N", "type": "object", "required": ["z"], "$defs": {"N": NEW}}, {"id": 1, "z": 1},
         {"id": 1, "z": 1, "y": 1}),
        ({"allOf": [NEW, {"type": "object", "properties": {"id": {"minimum": 5}}}]}, {"id": 5}, {"id": 5, "z": 1}),
        ({**NEW, "additionalProperties": {"type": "boolean"}}, {"id": 1, "ie": True},
         {"id": 1, **{f"k{i}": True for i in range(99)}}),
        ({**NEW, "additionalProperties": {"type": "boolean"}}, {"id": 1, "idea": True}, {"id": 1, "k" * 300: True}),
        ({**NEW, "required": [], "additionalProperties": True}, {}, {"id": 1, "k" * 300: True}),
        ({**NEW, "required": [], "additionalProperties": True}, {"id": 1, "k": 2}, {"k" * 300: True}),
        ({"type": "object", "patternProperties": {"^x-": {"type": "null"}}}, {"x-a": None}, {"x-" + "a" * 300: None}),
        ({"type": "object", "patternProperties": {"^x-": {"type": "null"}}}, {"x-a": None},
         {f"x-{i}": None for i in range(99)}),
        ({"type": "object", "propertyNames": {"pattern": r"^[a-z]+\.\w{2,}$"}}, {"ab.cd": 1}, {"a" * 300 + ".cd": 1}),
        ({"type": "object", "additionalProperties": {"type": "string"}}, {"a": "b"}, {"a": "b" * 120}),
        ({"type": ["object", "null"]}, {"a": 1}, {"k" * 300: 1}),
        ({"properties": {"a": {"type": "null"}}}, {"a": None}, "s" * 600),
        ({"type": "object", "patternProperties": {"^x-": {"type": "null"}, "^y-": {"type": "boolean"}}},
         {"x-a": None, "y-b": True}, {"x-" + "a" * 300: None}),
        ({"type": "object", "properties": {"x-a": {"type": "null"}}, "patternProperties": {"^x-": True, "^y": True}},
         {"x-a": None}, {"y" * 300: 1}),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "oneOf": [CAT, DOG]}, {"a": 1, "k": "cat"},
         {"a": 1, "k": "cat", "z": 1}),
        ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
          "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"b": None}, {"b": None, "z": 1}),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "dependentRequired": {"a": ["b"]}},
         {"a": None, "b": 1}, {"a": None, "b": 1, "z": 1}),
        ({"allOf": [NEW, {"anyOf": [CAT, DOG]}]}, {"id": 1, "k": "dog"}, {"id": 1, "k": "dog", "z": 1}),
        ({"type": "object", "minLength": 3, "oneOf": [{"maximum": 3}]}, {"a": 1}, {"k" * 300: 1}),
        ({"$ref": "c#/$defs/d", "$defs": {"e": {"$id": "c", "$defs": {"d": {"type": "string"}}}}}, "a", "a" * 600),
        ({"type": "string", "format": "time"}, "12:00:00.123Z", "12:00:00." + "1" * 100 + "Z"),
        ({"type": "string", "format": "duration"}, "P1Y2M", "P" + "1" * 100 + "Y"),
        ({"type": "string", "format": "email"}, "ann@example.com", "a" * 60 + "@" + "b" * 50 + ".com"),
        ({"type": "string", "format": "hostname"}, "www.example.com", "a" * 60 + "." + "b" * 60),
    ],
)  # fmt: skip
def test_every_part_ends_within_the_limit(schema: dict[str, Any], inside: Any, endless: Any) -> None:
    assert accepts(schema, inside, 100)
    assert not accepts(schema, endless, 100)
    # with room enough nothing is taken away
    assert accepts(schema, endless)


def test_shortened_names_stay_within_what_is_allowed() -> None:
    schema = {**NEW, "additionalProperties": {"type": "boolean"}}
    assert not accepts(schema, {"id": True}, 100)
    assert not accepts(schema, {"id": 1, "i": 1}, 100)
    for pattern, good, bad in [("^[*+]a$", "*a", "[a"), (r"^\+b+$", "+bb", "b"), ("^(ab|c)+$", "abc", "ba")]:
        named = {"type": "object", "propertyNames": {"pattern": pattern}}
        assert accepts(named, {good: 1}, 100)
        assert not accepts(named, {bad: 1}, 100)


def test_that_oneof_is_taken_for_anyof_is_said(caplog: pytest.LogCaptureFixture) -> None:
    grammar_of({"oneOf": [{"type": "integer"}, {"type": "number"}]})
    assert "oneOf is treated as anyOf" in caplog.text
