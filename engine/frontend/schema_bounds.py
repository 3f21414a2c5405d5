"""Adds bounds where a schema has none: an answer must fit into the tokens that its request allows.

The schema allows everything that the bounds allow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from sempre.engine.frontend.schema_numbers import LARGEST, kinds_of
from sempre.engine.frontend.schema_objects import join_objects, refers_through
from sempre.engine.frontend.schemas import COMBINING, KINDS, SPEAKING, WORDS_OF_ARRAYS, Node, Schema, merged

_LONGEST_STRING = 20_000
_MOST_ITEMS = 1000
_DEPTH = 3
_OF_OBJECTS = {"maxProperties", "minProperties", "properties", "required", "type"}
_FORMAT_LENGTHS = {"date-time": 35, "duration": 12, "email": 12, "hostname": 8, "time": 20, "uri": 16}
"""Minimum character bounds of formats without a maximum length."""
KEY_LENGTH = 20
_COMPARED = 4
"""Characters used to distinguish names, which keeps the pattern small: names that share more are left out."""
_OF_NUMBERS = {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"}
_WORDS_OF = {
    "array": WORDS_OF_ARRAYS,
    "integer": _OF_NUMBERS,
    "number": _OF_NUMBERS,
    "string": {"format", "maxLength", "minLength", "pattern"},
}
_PART = re.compile(r"\\.|\{(\d+),\}|.", re.DOTALL)


def add_bounds(root: Schema, nodes: list[Node], max_tokens: int) -> None:
    """Bound free strings, numbers, arrays, names and values of any kind, in place, so that they fit `max_tokens`."""
    # an object costs its names and the white space around them
    names = sum(len(name) // 3 + 6 for node in nodes for name in node.schema.get("properties") or ())
    share = max(4, (max_tokens - names) // max(1, sum(_is_free(node.schema) for node in nodes)))
    if _characters(share) > _LONGEST_STRING:
        return
    items = min(_MOST_ITEMS, max(2, share // 8))
    join_objects(root, nodes)
    together = merged(root, nodes)
    has_multiples = any(id(node.schema) in together and "multipleOf" in node.schema for node in nodes)
    any_value = _AnyValue(root, nodes)
    for schema, num_arrays in nodes:
        own = max(4, share // items**num_arrays)
        if not {"const", "enum", "$ref"} & set(schema):
            if id(schema) not in together:
                _open(schema)
            _bound_scalars(schema, own, has_steps=id(schema) in together and has_multiples)
            if _may_be(schema, "array") and "maxItems" not in schema:
                least = max(schema.get("minItems", 0), len(schema.get("prefixItems", ())))
                schema["maxItems"] = max(items, least)
        if id(schema) not in together:
            any_value.bound(schema, own)
        elif len(schema.get("patternProperties") or ()) == 1 and schema.get("additionalProperties") is False:
            any_value.bound_pattern(schema, own)


def _open(schema: Schema) -> None:
    """Name the types that the schema constrains, so that each of them is bounded."""
    if "type" not in schema and SPEAKING & set(schema) and not COMBINING & set(schema):
        schema["type"] = sorted(KINDS - {"integer"})


def _characters(share: int) -> int:
    """Minimum number of characters in `share` tokens of text."""
    return max(8, share * 5 // 2)


def _is_free(schema: Schema) -> bool:
    if {"const", "enum", "properties"} & set(schema) or COMBINING & set(schema):
        return False
    return schema.get("type") not in ("boolean", "null")


def _may_be(schema: Schema, kind: str) -> bool:
    """Whether a schema names the type, or names none but constrains its values."""
    kinds = schema.get("type")
    if kinds is None:
        if {"properties", *COMBINING} & set(schema):
            return bool(_WORDS_OF[kind] & set(schema))
        return bool(SPEAKING & set(schema))
    return kinds == kind or (isinstance(kinds, list) and kind in kinds)


def _bound_scalars(schema: Schema, share: int, *, has_steps: bool = False) -> None:
    """`has_steps`: other schemas give a `multipleOf` for the same number; the library multiplies them in 32 bits."""
    if _may_be(schema, "string"):
        form, least = schema.get("format"), schema.get("minLength", 0)
        if form in _FORMAT_LENGTHS:
            # digits and rare letters cost one token each
            most = max(_FORMAT_LENGTHS[form], share - 8, least)
            schema["maxLength"] = min(schema.get("maxLength", most), most)
        elif form is None:
            schema.setdefault("maxLength", max(_characters(share), least))
    is_number = _may_be(schema, "number")
    if is_number or _may_be(schema, "integer"):
        _bound_number(schema, share)
        if is_number and "multipleOf" not in schema and not has_steps:
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
    """Values of any type, with bounds of size and depth, as definitions at the root."""

    def __init__(self, root: Schema, nodes: list[Node]) -> None:
        self._root = root
        # whether a reference leads through an object, which then stays unchanged
        self._has_pointers = refers_through(nodes, "/properties/", "/patternProperties/")

    def bound(self, schema: Schema, share: int) -> None:
        """Replace the free values directly inside, and bound the unnamed properties."""
        # of those under a pattern there may be several
        for word, part in (("properties", share), ("patternProperties", _each_of_several(share))):
            children = schema.get(word)
            if isinstance(children, dict):
                schema[word] = {name: self._bounded(child, part) for name, child in children.items()}
        if "items" in schema or (_may_be(schema, "array") and not {"prefixItems", *COMBINING} & set(schema)):
            schema["items"] = self._bounded(schema.get("items", True), share // 4)
        schema.update(self._bounded(schema, share))
        if not COMBINING & set(schema) and ("object" in kinds_of(schema) or "properties" in schema):
            self._bound_names(schema, share)

    def bound_pattern(self, schema: Schema, share: int) -> None:
        """Bound the one pattern of names, and values of any kind there."""
        [(pattern, values)] = schema["patternProperties"].items()
        schema["patternProperties"] = {short_names(pattern) or pattern: self._bounded(values, share // 4)}

    def _bound_names(self, schema: Schema, share: int) -> None:
        values = schema.get("additionalProperties", True)
        named = schema.get("properties") or {}
        names = list(dict.fromkeys([*named, *(schema.get("required") or ())]))
        if schema.get("patternProperties"):
            if names:
                self._close_patterns(schema, names, share)
            else:
                self._bound_patterns(schema, share)
            return
        if values is False:
            return
        if names and "additionalProperties" not in schema:
            # no further ones fit
            schema["additionalProperties"] = False
            schema["properties"] = {name: self._bounded(named.get(name, True), share) for name in names}
            return
        most = _most_names(share)
        _share_out([values], share)
        further = {other_names(names): self._bounded(values, _each_of_several(share))}
        if not {name for name, child in named.items() if child is not False} <= set(schema.get("required") or ()):
            # further ones can only be counted if all named ones are present
            del schema["additionalProperties"]
            schema["properties"] = {name: self._bounded(named.get(name, values), share) for name in names}
            few = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
            all_named = {"required": names, "patternProperties": further, "maxProperties": len(names) + most}
            cases = [few, {**few, **all_named}]
            if schema.get("type") == "object" and not self._has_pointers:
                # whole objects, so that the cases have no siblings
                whole = {word: schema.pop(word) for word in _OF_OBJECTS & set(schema)}
                cases = [{**whole, **case, "properties": whole["properties"]} for case in cases]
            schema["anyOf"] = cases
            return
        schema["patternProperties"] = further
        schema["additionalProperties"] = False
        schema["properties"] = {name: self._bounded(named.get(name, values), share) for name in names}
        schema.setdefault("maxProperties", max(schema.get("minProperties", 0), len(names) + most))

    def _close_patterns(self, schema: Schema, names: list[str], share: int) -> None:
        """No further names fit; named properties follow the patterns they match."""
        named, rules = schema.get("properties") or {}, schema["patternProperties"]
        try:
            parts = {
                name: [*([named[name]] if name in named else []), *(rules[p] for p in rules if re.search(p, name))]
                for name in names
            }
        except re.error:
            return
        if self._has_pointers:
            return
        del schema["patternProperties"]
        others = schema.get("additionalProperties", True)
        schema["additionalProperties"] = False
        schema["properties"] = {
            name: {"allOf": found} if len(found) > 1 else self._bounded(found[0] if found else others, share)
            for name, found in parts.items()
        }

    def _bound_patterns(self, schema: Schema, share: int) -> None:
        """Bound the user's own name patterns; names that match no shortened pattern are excluded."""
        rules = schema["patternProperties"]
        _share_out(rules.values(), share)
        words = _OF_OBJECTS | {"patternProperties", "additionalProperties", "$defs"}
        is_whole = set(schema) <= words and not self._has_pointers
        if len(rules) == 1 or (is_whole and schema.get("type") == "object"):
            schema["patternProperties"] = {short_names(pattern) or pattern: values for pattern, values in rules.items()}
        schema["additionalProperties"] = False
        schema.setdefault("maxProperties", max(schema.get("minProperties", 0), _most_names(share)))
        if len(rules) > 1 and schema["patternProperties"] is not rules:
            # shortened patterns may no longer share a name; an impossible case makes the library compare the full ones
            compared = {"type": "object", "patternProperties": rules, "additionalProperties": False}
            nothing = {"required": [""], "properties": {"": False}}
            definitions = {word: schema.pop(word) for word in ("$defs",) if word in schema}
            cases = [{**schema}, {**compared, **nothing}]
            schema.clear()
            schema.update({**definitions, "anyOf": cases})

    def _bounded(self, child: Any, share: int) -> Any:
        if child is not True and (not isinstance(child, dict) or SPEAKING & set(child)):
            return child
        return {**({} if child is True else child), "$ref": f"#/$defs/{self._define(share, _DEPTH)}"}

    def _define(self, share: int, depth: int) -> str:
        """The name of the definition of values of about `share` tokens."""
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


def _each_of_several(share: int) -> int:
    """What each of the most properties without a name may take, besides its name and white space."""
    return max(4, share // _most_names(share) - 12)


def _share_out(values: Iterable[Any], share: int) -> None:
    """Bound scalars, each by its part of the share."""
    for value in values:
        if isinstance(value, dict) and value.get("type") == "string" and not {"const", "enum", "$ref"} & set(value):
            _bound_scalars(value, _each_of_several(share))


def other_names(names: list[str]) -> str:
    """A pattern of short names that are not among `names`."""
    if not any(names):
        return f"^(?s:.{{1,{KEY_LENGTH}}})$"
    return f"^(?:{_others(sorted(filter(None, names)), 0)})$"


def _others(names: list[str], depth: int) -> str:
    """An expression that matches none of the names, branching at every character like a trie."""
    tails: dict[str, list[str]] = {}
    for name in names:
        if name:
            tails.setdefault(name[0], []).append(name[1:])
    if not tails:
        return f"(?s:.{{1,{KEY_LENGTH}}})"
    others = "".join(map(re.escape, tails))
    cases = [f"[^{others}](?s:.{{0,{KEY_LENGTH - 1}}})"]
    if depth < _COMPARED:
        cases += [f"{re.escape(first)}(?:{_others(rest, depth + 1)})" for first, rest in tails.items()]
    if depth and "" not in names:
        cases.append("")
    return "|".join(cases)


def short_names(pattern: str) -> str | None:
    """`pattern` with every repetition and the name bounded; None if that cannot be derived from its text."""
    parts, depth, flat = [], 0, []
    for found in _PART.finditer(pattern):
        part = found.group()
        is_plain = depth == 0 and len(part) == 1
        depth += part == "["
        if not is_plain and depth == 0 and found.group(1):
            part = f"{{{found.group(1)},{max(int(found.group(1)), KEY_LENGTH)}}}"
        elif is_plain and part in "*+":
            # a `+` may follow another repetition
            part = f"{{{int(part == '+')},{KEY_LENGTH}}}"
        depth -= part == "]" and depth > 0
        parts.append(part)
        flat += [part] if is_plain and part in "^$|" else []
    at_start, at_end = bool(parts) and parts[0] == "^", bool(parts) and parts[-1] == "$"
    if depth or flat.count("^") != at_start or flat.count("$") != at_end or ("|" in flat and (at_start or at_end)):
        return None
    inner = "".join(parts[at_start : len(parts) - at_end])
    any_more = f"(?s:.{{0,{KEY_LENGTH}}})"
    return f"^{'' if at_start else any_more}(?:{inner}){'' if at_end else any_more}$"
