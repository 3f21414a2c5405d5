"""Schemas of any words in any place, contradictions among them: a function of the index alone."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
KINDS = ("string", "number", "integer", "object", "array", "boolean", "null")
NAMES = ("a", "b", "ab", "é", 'q"', "x-1")
PATTERNS = ("^a", "b$", "^[a-z]+$", "^x-", "^.{2,}$", "[0-9]", "^(a|b)+$")
NUMBERS = (0, 1, -1, 3, 10, 0.5, -2.5, 100, 2**31, 2**53 + 1, -(2**53) - 1, 2**63 - 1, 2**64)
FORMATS = ("date", "email", "uuid", "ipv4", "ipv6", "date-time", "time", "uri", "hostname", "duration", "foo")
VALUES = (1, "x", None, True, [1], {"a": 2}, 2**53 + 1, 0.5)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_SCALAR = (
    "type",
    "type",
    "type",
    "enum",
    "const",
    *_BOUNDS,
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "format",
)
_NESTED = (
    "items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "properties", "properties", "required",
    "additionalProperties", "patternProperties", "propertyNames", "minProperties", "maxProperties", "anyOf", "oneOf",
    "allOf", "not", "if", "dependentRequired", "dependentSchemas", "$ref", "unevaluatedProperties", "unevaluatedItems",
    "nullable", "x-foo",
)  # fmt: skip
_DEFINITIONS: Schema = {
    "list": {"type": "object", "properties": {"n": {"$ref": "#/$defs/list"}}, "additionalProperties": False},
    "named": {"$anchor": "named", "type": ["string", "null"]},
    "other": {
        "$id": "https://example.com/other",
        "type": "array",
        "items": {"$ref": "#/$defs/item"},
        "$defs": {"item": {"type": "integer"}},
    },
}
_REFERENCES = ("#", "#/$defs/any", "#/$defs/list", "#named", "https://example.com/other", "#/properties/a")


def schema(index: int) -> Schema:
    """One schema; equal indices give equal schemas."""
    generator = random.Random(index)
    depth = generator.choice((1, 1, 2, 2, 3))
    made = _schema(generator, depth)
    while isinstance(made, bool):
        made = _schema(generator, depth)
    return {**made, "$defs": {**_DEFINITIONS, "any": _schema(generator, 1)}}


def _schema(r: random.Random, depth: int) -> Schema | bool:
    if r.random() < 0.08:
        return r.random() < 0.75
    made: Schema = {}
    words = _SCALAR + (_NESTED if depth else ())
    for word in r.sample(words, r.choice((1, 1, 2, 2, 3, 4))):
        made[word] = _value(r, word, depth - 1)
    if "if" in made:
        made["then"] = _schema(r, depth - 1)
    if "properties" in made and r.random() < 0.6:
        made.setdefault("type", "object")
    return made


def _value(r: random.Random, word: str, depth: int) -> Any:
    if word in _BOUNDS:
        return r.choice(NUMBERS)
    if word in _COUNTS:
        return r.choice((0, 1, 2, 3, 5))
    match word:
        case "type":
            return r.choice(KINDS) if r.random() < 0.8 else r.sample(KINDS, 2)
        case "enum":
            return r.choices(VALUES, k=r.randint(1, 3))
        case "const":
            return r.choice(VALUES)
        case "multipleOf":
            return r.choice((1, 2, 7, 0.5, 0.01, 3))
        case "pattern":
            return r.choice(PATTERNS)
        case "format":
            return r.choice(FORMATS)
        case "uniqueItems" | "nullable":
            return r.random() < 0.5
        case "required":
            return r.sample(NAMES, r.randint(1, 2))
        case "properties" | "patternProperties":
            names = r.sample(NAMES if word == "properties" else PATTERNS, r.randint(1, 3))
            return {name: _schema(r, depth) for name in names}
        case "prefixItems" | "anyOf" | "oneOf" | "allOf":
            return [_schema(r, depth) for _ in range(r.randint(1, 3))]
        case "dependentRequired":
            return {r.choice(NAMES): r.sample(NAMES, 1)}
        case "dependentSchemas":
            return {r.choice(NAMES): _schema(r, depth)}
        case "$ref":
            return r.choice(_REFERENCES)
        case _:
            return _schema(r, depth)
