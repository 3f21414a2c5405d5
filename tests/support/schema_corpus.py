"""Schemas in the shapes that tools, models and interfaces publish: a function of the index alone."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ("name", "version", "items", "owner", "url", "status", "count", "tags", "spec", "labels", "id", "notes")
FORMATS = ("date-time", "email", "uri", "uuid", "int32", "int64", "double", "float", "password", "binary", "phone",
           "byte", "uri-reference", "regex", "json-pointer", "decimal", "ipv4", "semver", "color")  # fmt: skip
DRAFTS = ("http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#",
          "https://json-schema.org/draft/2020-12/schema", "https://example.com/our-meta-schema")  # fmt: skip
NUM_SCHEMAS = 1500


def schema(index: int) -> Schema:
    """One schema; equal indices give equal schemas."""
    generator = random.Random(index)
    return SHAPES[index % len(SHAPES)](generator)


def _names(r: random.Random, most: int = 5) -> list[str]:
    return r.sample(WORDS, r.randint(1, most))


def _scalar(r: random.Random) -> Schema:
    low = r.randint(-50, 50)
    return r.choice([
        {"type": "string"},
        {"type": "string", "description": "Free text.", "examples": ["a"], "default": "a"},
        {"type": "string", "format": r.choice(FORMATS)},
        {"type": "string", "pattern": r.choice(["^[a-z][a-z0-9-]*$", "^v\\d+(\\.\\d+){0,2}$", "^[^/]+$", "^$|^x"])},
        {"type": "string", "minLength": 1, "maxLength": r.choice([5, 63, 255, 4096])},
        {"type": "integer", "format": "int64"},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"type": "integer", "minimum": low, "maximum": low + r.randint(0, 500)},
        {"type": "integer", "exclusiveMinimum": low},
        {"type": "integer", "minimum": low, "exclusiveMinimum": True},
        {"type": "integer", "minimum": 2**53 + r.randint(0, 99)},
        {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308, "format": "double"},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "number", "multipleOf": 0.01},
        {"type": ["string", "null"]},
        {"type": "integer", "nullable": True},
        {"type": "boolean"},
        {"enum": ["a", "b", 3, None]},
        {"const": r.choice(["fixed", 17, True])},
        {},
    ])  # fmt: skip


def _object(r: random.Random, depth: int = 1) -> Schema:
    names = _names(r)
    made: Schema = {"type": "object", "properties": {name: _value(r, depth) for name in names}}
    if r.random() < 0.6:
        made["required"] = r.sample(names, r.randint(1, len(names)))
    if r.random() < 0.5:
        made["additionalProperties"] = r.choice([False, True, {"type": "string"}])
    return made


def _value(r: random.Random, depth: int) -> Schema:
    if depth and r.random() < 0.4:
        inner = _object(r, depth - 1) if r.random() < 0.5 else _scalar(r)
        return {"type": "array", "items": inner, **r.choice([{}, {"minItems": 1}, {"maxItems": 4}])}
    return _object(r, depth - 1) if depth and r.random() < 0.3 else _scalar(r)


def package(r: random.Random) -> Schema:
    """A manifest."""
    return {
        "$schema": r.choice(DRAFTS),
        "title": "A manifest",
        "definitions": {
            "person": {
                "type": ["object", "string"],
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "url": {"type": "string", "format": "uri"}},
            },
            "dependency": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "type": "object",
        "patternProperties": {"^_": {"tsType": "any"}},
        "properties": {
            "author": {"$ref": "#/definitions/person"},
            "license": {"anyOf": [{"type": "string"}, {"enum": ["MIT", "Apache-2.0"]}]},
            "dependencies": {"$ref": "#/definitions/dependency"},
            **{name: _value(r, 1) for name in _names(r, 3)},
        },
    }


def interface(r: random.Random) -> Schema:
    """Components of an HTTP interface."""
    return {
        "$ref": "#/components/schemas/Pet",
        "components": {
            "schemas": {
                "Pet": {**_object(r), "discriminator": {"propertyName": "kind"}, "xml": {"name": "Pet"}},
                "Error": {"type": "object", "properties": {"code": {"type": "integer", "format": "int32"}}},
            }
        },
    }


def resource(r: random.Random) -> Schema:
    """A resource of a cluster."""
    quantity = {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "pattern": "^[0-9]+(m|Mi|Gi)?$",
        "x-kubernetes-int-or-string": True,
    }
    return {
        "type": "object",
        "description": "A resource.",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {
                "type": "object",
                "properties": {
                    "replicas": {"type": "integer", "format": "int32", "minimum": 0},
                    "limits": {"type": "object", "additionalProperties": quantity},
                    **{name: _value(r, 1) for name in _names(r, 3)},
                },
                "x-kubernetes-preserve-unknown-fields": True,
            },
        },
        "required": ["spec"],
    }


def model_of_python(r: random.Random) -> Schema:
    """What a library of data classes writes."""
    key = r.choice(["$defs", "definitions"])
    reference = {"$ref": f"#/{key}/Item"}
    wrapped = {"title": "Item", "allOf": [reference], "default": {}} if key == "definitions" else reference
    return {
        key: {"Item": {**_object(r), "title": "Item"}, "Color": {"enum": ["red", "green"], "type": "string"}},
        "title": "Order",
        "type": "object",
        "properties": {
            "item": wrapped,
            "maybe": {"anyOf": [reference, {"type": "null"}], "default": None},
            "color": {"$ref": f"#/{key}/Color"},
            "pair": {"type": "array", "minItems": 2, "maxItems": 2, "items": [{"type": "integer"}, {"type": "string"}]},
            "map": {"type": "object", "additionalProperties": reference},
            **{name: _value(r, 1) for name in _names(r, 2)},
        },
        "required": ["item", "color"],
    }


def tree(r: random.Random) -> Schema:
    """Recursion."""
    node = {
        "type": "object",
        "properties": {"value": _scalar(r), "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["value"],
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": {"$anchor": "node", **node}}}


def named_parts(r: random.Random) -> Schema:
    """References by identifier and anchor."""
    part = r.choice([{"$anchor": "part"}, {"$id": "#part"}])
    properties = {"a": {"$ref": "#part"}, "b": _scalar(r)}
    definitions = {"p": {**part, **_scalar(r)}}
    return {"$id": "https://example.com/root", "type": "object", "properties": properties, "definitions": definitions}


def cases(r: random.Random) -> Schema:
    """One of several."""
    kinds = [
        {"type": "object", "properties": {"kind": {"const": name}, **_object(r)["properties"]}, "required": ["kind"]}
        for name in ("x", "y")
    ]
    return {r.choice(["oneOf", "anyOf"]): [*kinds, r.choice([{"type": "string"}, _object(r, 0)])]}


def merged(r: random.Random) -> Schema:
    """Parts of one object."""
    return {"allOf": [{"type": "object", "properties": {"a": _scalar(r)}},
                      {"properties": {"b": _scalar(r)}, "required": ["b"]}, {"description": "Nothing."}]}  # fmt: skip


def conditions(r: random.Random) -> Schema:
    """What one property asks of others, and of their names and number."""
    properties = {name: _scalar(r) for name in ("a", "b", "c")}
    rule = r.choice([
        {"dependentRequired": {"a": ["b"]}},
        {"dependencies": {"a": ["b"], "c": {"properties": {"b": {"type": "string"}}}}},
        {"minProperties": 1},
        {"maxProperties": 3},
        {"not": {"required": ["a", "b"]}},
        {"unevaluatedProperties": False},
        {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"if": {"required": ["a"]}, "then": True},
    ])  # fmt: skip
    return {"type": "object", "properties": properties, **rule}


def maps(r: random.Random) -> Schema:
    """Objects whose names are data."""
    names = r.choice([
        {"propertyNames": {"pattern": "^[a-z]{1,8}$"}},
        {"propertyNames": {"maxLength": 9}},
        {"propertyNames": {"enum": ["x", "y"]}},
        {"propertyNames": {"format": "semver"}},
        {"patternProperties": {"^x-": _scalar(r)}, "additionalProperties": False},
        {"patternProperties": {".*": _scalar(r)}},
    ])  # fmt: skip
    extra = {} if "patternProperties" in names else {"additionalProperties": _scalar(r)}
    return {"type": "object", **names, **extra, **r.choice([{}, {"minProperties": 1}])}


def beyond(r: random.Random) -> Schema:
    """What no grammar can enforce."""
    rule = r.choice([
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {"type": "integer"}},
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
        {"type": "string", "not": {"pattern": "^a"}},
        {"type": "string", "pattern": "^(?!a)"},
    ])  # fmt: skip
    return {"type": "object", "properties": {"a": rule}, "required": ["a"]}


SHAPES = (package, interface, resource, model_of_python, tree, named_parts, cases, merged, conditions, maps, beyond)
