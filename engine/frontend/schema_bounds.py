"""Ends for what a schema leaves without: an answer has to fit into the tokens that its request allows.

Whatever the bounds allow, the schema allows too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sempre.engine.frontend.schema_names import other_names, short_names
from sempre.engine.frontend.schema_numbers import LARGEST
from sempre.engine.frontend.schema_references import target_of
from sempre.engine.frontend.schemas import COMBINING, Node, Schema, subschemas

_LONGEST_STRING = 20_000
_MOST_ITEMS = 1000
_DEPTH = 3
_ASIDE = ("$defs", "definitions")
_SPEAKING = COMBINING | {
    "$dynamicRef", "$recursiveRef", "additionalProperties", "const", "contains", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "multipleOf", "not", "pattern", "patternProperties", "prefixItems",
    "properties", "required", "type", "uniqueItems",
}  # fmt: skip
"""Words that say something of the value; all others, as OpenAPI's, only remark or hold what is referred to."""
_OF_OBJECTS = {"maxProperties", "minProperties", "properties", "required", "type"}
_FORMAT_LENGTHS = {"date-time": 35, "duration": 12, "email": 12, "hostname": 8, "time": 20, "uri": 16}
"""Least bounds of characters of formats without an end of their own."""


def add_bounds(root: Schema, nodes: list[Node], max_tokens: int) -> None:
    """Bound free strings, numbers, arrays, names and values of any kind, in place, so that they fit `max_tokens`."""
    # an object costs its names, and white space around them
    names = sum(len(name) // 3 + 6 for node in nodes for name in node.schema.get("properties") or ())
    share = max(4, (max_tokens - names) // max(1, sum(_is_free(node.schema) for node in nodes)))
    if _characters(share) > _LONGEST_STRING:
        return
    items = min(_MOST_ITEMS, max(2, share // 8))
    _join(root, nodes)
    merged = _merged(root, nodes)
    any_value = _AnyValue(root, nodes)
    for schema, num_arrays in nodes:
        own = max(4, share // items**num_arrays)
        if not {"const", "enum", "$ref"} & set(schema):
            _bound_scalars(schema, own)
            if _may_be(schema, "array") and "maxItems" not in schema:
                least = max(schema.get("minItems", 0), len(schema.get("prefixItems", ())))
                schema["maxItems"] = max(items, least)
        if id(schema) not in merged:
            any_value.bound(schema, own)


def _join(root: Schema, nodes: list[Node]) -> None:
    """Make one object of open objects that speak of the same value, in place: only together can they be closed."""
    if any("/allOf/" in str(node.schema.get("$ref")) for node in nodes):
        return
    for schema, num_arrays in list(nodes):
        if not ("allOf" in schema or ("$ref" in schema and len(_SPEAKING & set(schema)) > 1)):
            continue
        parts = _object_parts(root, schema, [])
        if parts is None or not any(part.get("type") == "object" for part in parts):
            continue
        properties: Schema = {}
        for part in parts:
            for name, child in part.get("properties", {}).items():
                if name in properties and properties[name] != child:
                    child = {"allOf": [properties[name], child]}
                    nodes.append(Node(child, num_arrays))
                properties[name] = child
        required = dict.fromkeys(name for part in parts for name in part.get("required", ()))
        for word in ("$ref", "allOf"):
            schema.pop(word, None)
        schema.update({"type": "object", "properties": properties, "required": list(required)})


def _object_parts(root: Schema, schema: Any, around: list[int]) -> list[Schema] | None:
    """The schemas that `schema` is made of, without choices; None if one is more than an open object."""
    words = _SPEAKING & set(schema) if isinstance(schema, dict) else {""}
    if id(schema) in around or not words <= {"$ref", "allOf", "properties", "required", "type"}:
        return None
    if schema.get("type", "object") != "object":
        return None
    parts: list[Schema] = [schema]
    targets = [target_of(root, schema["$ref"])] if "$ref" in words else []
    for child in [*targets, *schema.get("allOf", ())]:
        inner = _object_parts(root, child, [*around, id(schema)])
        if inner is None:
            return None
        parts += inner
    return parts


def _merged(root: Schema, nodes: list[Node]) -> set[int]:
    """The schemas beside which others speak of the same value, by identity."""
    # a type alone contradicts no bound of its cases
    speaking = [(node.schema, _SPEAKING & set(node.schema) - {"type"}) for node in nodes]
    pending = [schema for schema, words in speaking if COMBINING & words and len(words) > 1]
    pending += [node.schema for node in nodes if len(node.schema.get("allOf", ())) > 1]
    merged: set[int] = set()
    while pending:
        schema = pending.pop()
        if id(schema) in merged:
            continue
        merged.add(id(schema))
        reference = schema.get("$ref")
        target = target_of(root, reference) if isinstance(reference, str) and reference.startswith("#") else None
        children = [child for path, child in subschemas(schema) if path.partition("/")[0] not in _ASIDE]
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
        return not {"properties", *COMBINING} & set(schema) and bool(_SPEAKING & set(schema))
    return kinds == kind or (isinstance(kinds, list) and kind in kinds)


def _bound_scalars(schema: Schema, share: int) -> None:
    if _may_be(schema, "string") and "maxLength" not in schema:
        form = schema.get("format")
        if form is None:
            schema["maxLength"] = max(_characters(share), schema.get("minLength", 0))
        elif form in _FORMAT_LENGTHS:
            # digits and odd letters cost a token each
            schema["maxLength"] = max(_FORMAT_LENGTHS[form], share - 8, schema.get("minLength", 0))
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

    def __init__(self, root: Schema, nodes: list[Node]) -> None:
        self._root = root
        # whether a reference leads through an object, which then stays as it is
        self._has_pointers = any("/properties/" in str(node.schema.get("$ref")) for node in nodes)

    def bound(self, schema: Schema, share: int) -> None:
        """Replace the free values directly inside, and end the properties that are not named."""
        for word in ("properties", "patternProperties"):
            children = schema.get(word)
            if isinstance(children, dict):
                schema[word] = {name: self._bounded(child, share) for name, child in children.items()}
        if "items" in schema or (_may_be(schema, "array") and not {"prefixItems", *COMBINING} & set(schema)):
            schema["items"] = self._bounded(schema.get("items", True), share // 4)
        schema.update(self._bounded(schema, share))
        if not COMBINING & set(schema) and (schema.get("type") == "object" or "properties" in schema):
            self._bound_names(schema, share)

    def _bound_names(self, schema: Schema, share: int) -> None:
        values = schema.get("additionalProperties", True)
        named = schema.get("properties") or {}
        names = list(dict.fromkeys([*named, *(schema.get("required") or ())]))
        if schema.get("patternProperties"):
            if not names:
                self._bound_patterns(schema, share)
            return
        if values is False:
            return
        if names and "additionalProperties" not in schema:
            # no number of further ones fits
            schema["additionalProperties"] = False
            schema["properties"] = {name: self._bounded(named.get(name, True), share) for name in names}
            return
        most = _most_names(share)
        _share_out([values], share)
        further = {other_names(names): self._bounded(values, max(4, share // most - 12))}
        if not {name for name, child in named.items() if child is not False} <= set(schema.get("required") or ()):
            # further ones can only be counted where all named ones are there
            del schema["additionalProperties"]
            schema["properties"] = {name: self._bounded(named.get(name, values), share) for name in names}
            few = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
            all_named = {"required": names, "patternProperties": further, "maxProperties": len(names) + most}
            cases = [few, {**few, **all_named}]
            if schema.get("type") == "object" and not self._has_pointers:
                # whole objects, so that nothing stands beside the cases
                whole = {word: schema.pop(word) for word in _OF_OBJECTS & set(schema)}
                cases = [{**whole, **case, "properties": whole["properties"]} for case in cases]
            schema["anyOf"] = cases
            return
        schema["patternProperties"] = further
        schema["additionalProperties"] = False
        schema["properties"] = {name: self._bounded(named.get(name, values), share) for name in names}
        schema.setdefault("maxProperties", max(schema.get("minProperties", 0), len(names) + most))

    def _bound_patterns(self, schema: Schema, share: int) -> None:
        """Names by the user's own patterns; a name that no shortened pattern matches is none."""
        rules = schema["patternProperties"]
        _share_out(rules.values(), share)
        if len(rules) == 1:
            # of several, one that is shortened may leave names to another that they share
            [(pattern, values)] = rules.items()
            schema["patternProperties"] = {short_names(pattern) or pattern: values}
        schema["additionalProperties"] = False
        schema.setdefault("maxProperties", max(schema.get("minProperties", 0), _most_names(share)))

    def _bounded(self, child: Any, share: int) -> Any:
        if child is not True and (not isinstance(child, dict) or _SPEAKING & set(child)):
            return child
        return {**({} if child is True else child), "$ref": f"#/$defs/{self._define(share, _DEPTH)}"}

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
                    "patternProperties": {other_names([]): inner},
                    "additionalProperties": False,
                    "maxProperties": most,
                }
            )
        return name


def _most_names(share: int) -> int:
    return min(_MOST_ITEMS, max(2, share // 32))


def _share_out(values: Iterable[Any], share: int) -> None:
    """Bound scalars that stand under so many names as a share allows."""
    for value in values:
        if isinstance(value, dict) and value.get("type") == "string" and not {"const", "enum", "$ref"} & set(value):
            _bound_scalars(value, max(4, share // _most_names(share) - 12))
