"""Ends for what a schema leaves without: an answer has to fit into the tokens that its request allows.

Whatever the bounds allow, the schema allows too.
"""

from __future__ import annotations

import math
from typing import Any

from sempre.engine.frontend.schema_numbers import LARGEST
from sempre.engine.frontend.schemas import COMBINING, Node, Schema, subschemas, target_of

_LONGEST_STRING = 20_000
_MOST_ITEMS = 1000
_KEY_LENGTH = 20
_DEPTH = 3
_SILENT = frozenset({"$anchor", "$defs", "$id", "definitions", "x-guidance"})


def add_bounds(root: Schema, nodes: list[Node], max_tokens: int) -> None:
    """Bound free strings, numbers, arrays, names and values of any kind, in place, so that they fit `max_tokens`."""
    # an object costs its names, and white space around them
    names = sum(len(name) // 3 + 6 for node in nodes for name in node.schema.get("properties") or ())
    share = max(4, (max_tokens - names) // max(1, sum(_is_free(node.schema) for node in nodes)))
    if _characters(share) > _LONGEST_STRING:
        return
    items = min(_MOST_ITEMS, max(2, share // 8))
    merged = _merged(root, nodes)
    any_value = _AnyValue(root)
    for schema, num_arrays in nodes:
        own = max(4, share // items**num_arrays)
        if not {"const", "enum", "$ref"} & set(schema):
            _bound_scalars(schema, own)
            if _may_be(schema, "array") and "maxItems" not in schema:
                least = max(schema.get("minItems", 0), len(schema.get("prefixItems", ())))
                schema["maxItems"] = max(items, least)
        if id(schema) not in merged:
            any_value.bound(schema, own)


def _merged(root: Schema, nodes: list[Node]) -> set[int]:
    """The schemas beside which others speak of the same value, by identity."""
    pending = [node.schema for node in nodes if COMBINING & set(node.schema) and len(set(node.schema) - _SILENT) > 1]
    pending += [node.schema for node in nodes if len(node.schema.get("allOf", ())) > 1]
    merged: set[int] = set()
    while pending:
        schema = pending.pop()
        if id(schema) in merged:
            continue
        merged.add(id(schema))
        reference = schema.get("$ref")
        target = target_of(root, reference) if isinstance(reference, str) and reference.startswith("#/") else None
        children = [child for path, child in subschemas(schema) if path.partition("/")[0] not in _SILENT]
        pending += [child for child in (target, *children) if isinstance(child, dict)]
    return merged


def _characters(share: int) -> int:
    """Of so many tokens of text, at least."""
    return max(8, share * 5 // 2)


def _is_free(schema: Schema) -> bool:
    if {"const", "enum", "properties"} & set(schema) or COMBINING & set(schema):
        return False
    return schema.get("type") not in ("boolean", "null")


def _may_be(schema: Schema, kind: str) -> bool:
    """Whether a schema names the kind, or leaves it open and says something of values."""
    kinds = schema.get("type")
    if kinds is None:
        return not {"properties", *COMBINING} & set(schema) and bool(set(schema) - _SILENT)
    return kinds == kind or (isinstance(kinds, list) and kind in kinds)


def _bound_scalars(schema: Schema, share: int) -> None:
    if _may_be(schema, "string") and "maxLength" not in schema:
        schema["maxLength"] = max(_characters(share), schema.get("minLength", 0))
    is_number = _may_be(schema, "number")
    if is_number or _may_be(schema, "integer"):
        _bound_number(schema, share)
        if is_number and "multipleOf" not in schema:
            schema["multipleOf"] = 1e-9 if share >= 32 else 1e-3


def _bound_number(schema: Schema, share: int) -> None:
    reach = LARGEST if share >= 24 else 10 ** min(share, 15)
    given = [schema[word] for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if word in schema]
    reach = min(LARGEST, max([reach, *(10 * math.ceil(abs(value)) for value in given)]))
    if not {"minimum", "exclusiveMinimum"} & set(schema):
        schema["minimum"] = -reach
    if not {"maximum", "exclusiveMaximum"} & set(schema):
        schema["maximum"] = reach


class _AnyValue:
    """Values of any kind, with bounds of size and depth, as definitions at the root."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def bound(self, schema: Schema, share: int) -> None:
        """Replace the free values directly inside, and end the properties that are not named."""
        for word in ("properties", "patternProperties"):
            children = schema.get(word)
            if isinstance(children, dict):
                schema[word] = {name: self._bounded(child, share) for name, child in children.items()}
        if "items" in schema or (_may_be(schema, "array") and "prefixItems" not in schema):
            schema["items"] = self._bounded(schema.get("items", True), share // 4)
        if schema == {} or set(schema) <= _SILENT:
            schema.update(self._bounded(True, share) if schema is self._root else {})
        if schema.get("type") == "object" or "properties" in schema:
            self._bound_names(schema, share)

    def _bound_names(self, schema: Schema, share: int) -> None:
        values = schema.get("additionalProperties", True)
        if schema.get("patternProperties") or values is False:
            return
        named = schema.get("properties")
        if named or schema.get("required"):
            properties = {
                **(named or {}),
                **{name: values for name in schema.get("required", ()) if name not in (named or {})},
            }
            if "additionalProperties" not in schema:
                # no number of further ones fits
                schema["additionalProperties"] = False
                schema["properties"] = {name: self._bounded(child, share) for name, child in properties.items()}
            return
        most = min(_MOST_ITEMS, max(2, share // 32))
        schema["patternProperties"] = {_key_pattern(): self._bounded(values, max(4, share // most - 12))}
        schema["additionalProperties"] = False
        schema.setdefault("maxProperties", max(schema.get("minProperties", 0), most))

    def _bounded(self, child: Any, share: int) -> Any:
        if child is not True and child != {}:
            return child
        return {"$ref": f"#/$defs/{self._define(share, _DEPTH)}"}

    def _define(self, share: int, depth: int) -> str:
        """The name of values of about `share` tokens."""
        name = f"any-value-{share}-{depth}"
        definitions = self._root.setdefault("$defs", {})
        if name in definitions:
            return name
        kinds: list[Schema] = [
            {"type": ["null", "boolean"]},
            {"type": "number", "minimum": -(10**15), "maximum": 10**15, "multipleOf": 1e-6},
            {"type": "string", "maxLength": _characters(share)},
        ]
        definitions[name] = {"anyOf": kinds}
        if depth > 1 or (depth and share >= 8):
            most = max(2, min(64, share // 24))
            inner = {"$ref": f"#/$defs/{self._define(max(1, share * 3 // 4 // most - 8), depth - 1)}"}
            kinds.append({"type": "array", "items": inner, "maxItems": most})
            kinds.append(
                {
                    "type": "object",
                    "patternProperties": {_key_pattern(): inner},
                    "additionalProperties": False,
                    "maxProperties": most,
                }
            )
        return name


def _key_pattern() -> str:
    return f"^(?s:.{{1,{_KEY_LENGTH}}})$"
