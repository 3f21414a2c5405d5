"""Joins the schemas of one object into one, or one per case: only then can it be closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sempre.engine.frontend.schema_numbers import EXACT, kinds_of
from sempre.engine.frontend.schema_references import target_of
from sempre.engine.frontend.schemas import (
    COMBINING,
    KINDS,
    SPEAKING,
    WORDS_OF_ARRAYS,
    WORDS_OF_OBJECTS,
    Node,
    Schema,
    narrow,
)

_MOST_CASES = 32
_MOST_PARTS = 1000
_MOST_STEPS = 50_000
"""Maximum schemas visited in total; anything larger stays unchanged."""


class _Effort:
    """Counts visited schemas, since references may multiply them endlessly."""

    def __init__(self) -> None:
        self._left = _MOST_STEPS

    def is_spent(self) -> bool:
        self._left -= 1
        return self._left < 0


_CLOSEST: dict[str, Callable[[Any, Any], Any]] = {
    "maximum": min, "exclusiveMaximum": min, "maxLength": min,
    "minimum": max, "exclusiveMinimum": max, "minLength": max,
}  # fmt: skip
_OWN = {"additionalProperties", "maxProperties", "minProperties", "properties", "required", "type"}


def refers_through(nodes: list[Node], *words: str) -> bool:
    """Whether a reference leads through one of the keywords, below which nothing may move."""
    return any(word in str(node.schema.get("$ref")) for node in nodes for word in words)


def join_objects(root: Schema, nodes: list[Node]) -> None:
    """Join the object schemas of the same value into one, or one per case, in place."""
    if refers_through(nodes, "/allOf/", "/anyOf/", "/oneOf/"):
        return
    is_fixed, effort = refers_through(nodes, "/properties/"), _Effort()
    for schema, num_arrays in list(nodes):
        words = SPEAKING & set(schema)
        if not (COMBINING & words and (len(words) > 1 or "allOf" in words)):
            continue
        if not is_fixed:
            _spread(schema, _kinds(root, schema, [], effort))
            _flatten(schema)
            if not COMBINING & set(schema):
                continue
        cases = _cases(root, schema, [], effort)
        if not cases or (is_fixed and len(cases) > 1) or not all(map(_is_object, cases)):
            continue
        joined = [_joined(parts, nodes, num_arrays) for parts in cases]
        word = "oneOf" if any("oneOf" in part for parts in cases for part in parts) else "anyOf"
        for taken in _OWN | COMBINING:
            schema.pop(taken, None)
        if len(joined) == 1:
            schema.update(joined[0])
        else:
            schema[word] = joined
            nodes += [Node(case, num_arrays) for case in joined]


def _kinds(root: Schema, schema: Any, around: list[int], effort: _Effort) -> set[str]:
    """The types that all schemas of a value allow."""
    if not isinstance(schema, dict) or id(schema) in around or effort.is_spent():
        return set() if schema is False else set(KINDS)
    around = [*around, id(schema)]
    kinds = kinds_of(schema) or set(KINDS)
    if "number" in kinds:
        kinds.add("integer")
    groups = [[target_of(root, schema["$ref"])]] if isinstance(schema.get("$ref"), str) else []
    groups += [[child] for child in schema.get("allOf", ())]
    groups += [schema[word] for word in ("anyOf", "oneOf") if word in schema]
    for group in groups:
        kinds &= set().union(*(_kinds(root, child, around, effort) for child in group))
    return kinds


def _spread(schema: Schema, kinds: set[str]) -> None:
    """Set the types in a schema and its parts, so that each can drop what concerns other types."""
    if kinds == KINDS or not kinds:
        return
    own = kinds_of(schema)
    allowed = kinds & (own | ({"integer"} if "number" in own else set())) if own else kinds
    if not allowed:
        return
    names = sorted(allowed - {"integer"} if "number" in allowed else allowed)
    schema["type"] = names[0] if len(names) == 1 else names
    narrow(schema)
    for word in ("allOf", "anyOf", "oneOf"):
        for child in schema.get(word, ()):
            if isinstance(child, dict) and not {"$ref", "const", "enum"} & set(child):
                _spread(child, allowed)


def _flatten(schema: Schema) -> None:
    """Merge parts of `allOf` about other keywords into the schema itself, and remove cases without a condition."""
    if any(child is True or child == {} for child in schema.get("anyOf", ())):
        del schema["anyOf"]
    kept = [child for child in schema.get("allOf", ()) if child is not True and not _is_taken(schema, child)]
    if kept:
        schema["allOf"] = kept
    else:
        schema.pop("allOf", None)


def _is_taken(schema: Schema, child: Any) -> bool:
    """Merge a part if it has other keywords than the schema, or the same bounds; return whether it did."""
    if not isinstance(child, dict) or EXACT in child or EXACT in schema:
        return False
    words, own = SPEAKING & set(child) - {"type"}, SPEAKING & set(schema) - {"type"}
    kinds = kinds_of(child)
    if (kinds and not kinds_of(schema)) or (kinds and not kinds_of(schema) <= kinds):
        return False
    if words & (COMBINING | {"const", "enum"} | WORDS_OF_OBJECTS) or (words & own) - set(_CLOSEST):
        return False
    if words & WORDS_OF_ARRAYS and own & WORDS_OF_ARRAYS:
        return False
    for word in words:
        schema[word] = _CLOSEST[word](schema[word], child[word]) if word in own else child[word]
    return True


def _is_object(parts: list[Schema]) -> bool:
    return any(part.get("type") == "object" for part in parts)


def _cases(root: Schema, schema: Any, around: list[int], effort: _Effort) -> list[list[Schema]] | None:
    """For each case its schemas; None if one constrains more than names and values of properties."""
    if isinstance(schema, bool):
        return [[]] if schema else []
    if effort.is_spent():
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, dict) else None
    if isinstance(values, list) and not any(isinstance(value, dict) for value in values):
        return []
    words = SPEAKING & set(schema) if isinstance(schema, dict) else {""}
    if id(schema) in around or not words <= _OWN | COMBINING or schema.get("type", "object") != "object":
        return None
    if schema.get("additionalProperties", True) not in (True, False, {}):
        return None
    groups = [[target_of(root, schema["$ref"])]] if "$ref" in words else []
    groups += [[child] for child in schema.get("allOf", ())]
    groups += [schema[word] for word in ("anyOf", "oneOf") if word in words]
    cases: list[list[Schema]] = [[schema]]
    for group in groups:
        options: list[list[Schema]] = []
        for child in group:
            found = _cases(root, child, [*around, id(schema)], effort)
            if found is None:
                return None
            options += found
        if len(cases) * len(options) > _MOST_CASES:
            return None
        cases = [[*case, *option] for case in cases for option in options]
        if any(len(case) > _MOST_PARTS for case in cases):
            return None
    return cases


def _joined(parts: list[Schema], nodes: list[Node], num_arrays: int) -> Schema:
    properties: Schema = {}
    for part in parts:
        for name, child in part.get("properties", {}).items():
            known = properties.get(name, child)
            if known is False or child is False:
                child = False
            elif known != child:
                child = {"allOf": [known, child]}
                nodes.append(Node(child, num_arrays))
            properties[name] = child
    required = list(dict.fromkeys(name for part in parts for name in part.get("required", ())))
    closed = [part.get("properties", {}) for part in parts if part.get("additionalProperties") is False]
    for known in closed:
        properties.update({name: False for name in [*properties, *required] if name not in known})
    joined: Schema = {"type": "object", "properties": properties, "required": required}
    for word, closest in (("minProperties", max), ("maxProperties", min)):
        counts = [part[word] for part in parts if word in part]
        if counts:
            joined[word] = closest(counts)
    return {**joined, "additionalProperties": False} if closed else joined
