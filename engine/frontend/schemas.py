"""Rewrites a JSON schema with the keywords that the grammar library supports; the result allows the same or less.

A constraint that no grammar can enforce is refused by place and name; annotations (other `format` values, titles,
unknown keywords) are dropped. If a schema can be kept only in part, the result allows nothing that the schema
forbids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sempre.engine.frontend.schema_numbers import (
    check_common_multiple,
    check_multiples,
    check_range,
    kinds_of,
    rewrite_numbers,
    rewrite_values,
)
from sempre.engine.frontend.schema_references import References, reached

Schema = dict[str, Any]

FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Formats that are enforced; all others are annotations."""

_ANNOTATIONS = ("$comment", "$schema", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "default",
                "deprecated", "description", "example", "examples", "readOnly", "title", "writeOnly")  # fmt: skip
_ONE = ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
        "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
_MOST = {"properties": 1000, "patternProperties": 1000, "required": 1000, "anyOf": 500, "oneOf": 500, "allOf": 500}
"""Maximum entries of one object or one list of cases: compiling takes quadratic time and memory."""
COMBINING = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
SPEAKING = COMBINING | {
    "$dynamicRef", "$recursiveRef", "additionalProperties", "const", "contains", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "multipleOf", "not", "pattern", "patternProperties", "prefixItems",
    "properties", "required", "type", "uniqueItems",
}  # fmt: skip
"""Keywords that constrain the value; all others, such as OpenAPI's, are annotations or hold targets of references."""
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
WORDS_OF_ARRAYS = {"contains", "items", "maxContains", "maxItems", "minContains", "minItems", "prefixItems",
                   "unevaluatedItems", "uniqueItems"}  # fmt: skip
WORDS_OF_OBJECTS = {
    "additionalProperties", "dependentRequired", "dependentSchemas", "maxProperties", "minProperties",
    "patternProperties", "properties", "propertyNames", "required", "unevaluatedProperties",
}  # fmt: skip
_WORDS_OF = {
    frozenset({"integer", "number"}): {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"},
    frozenset({"string"}): {"format", "maxLength", "minLength", "pattern"},
    frozenset({"array"}): WORDS_OF_ARRAYS,
    frozenset({"object"}): WORDS_OF_OBJECTS,
}
_MOST_OF_NAME = 253
_EMAIL = r"^[^@]{1,64}@([^.]{1,63}\.)*[^.]{1,63}$"
KINDS = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


class SchemaRefused(Exception):
    """A constraint that no grammar can enforce. The text begins with its place, a JSON pointer."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place or 'the schema'}: {reason}")


class Node(NamedTuple):
    """A schema inside another."""

    schema: Schema
    num_arrays: int
    """ancestors, of any depth"""


def rewritten(root: Schema, *, closed: bool = False) -> tuple[Schema, list[Node]]:
    """Rewrite `root` in place for the library; return it and all schemas that it uses. `closed`: objects have only
    named properties.

    Raises SchemaRefused.
    """
    references = References(root, subschemas)
    walk = _Walk(closed)
    walk.enter(root, "")
    for pointer, target in references.targets():
        walk.enter(target, pointer)
    references.write()
    used = reached(root, [root], subschemas)
    nodes = [node for node in walk.nodes if id(node.schema) in used]
    try:
        check_range(root)
        multiples = [node.schema for node in nodes if "multipleOf" in node.schema]
        check_multiples(schema["multipleOf"] for schema in multiples)
        together = merged(root, nodes) if len(multiples) > 1 else set()
        check_common_multiple(schema["multipleOf"] for schema in multiples if id(schema) in together)
    except ValueError as error:
        raise SchemaRefused("", str(error)) from None
    return root, nodes


class _Walk:
    def __init__(self, closed: bool) -> None:
        self._closed = closed
        self._seen: set[int] = set()
        self.nodes: list[Node] = []

    def enter(self, root: Schema, place: str) -> None:
        """Rewrite a schema and all inside, in place."""
        pending = [(root, place, 0)]
        while pending:
            schema, where, num_arrays = pending.pop()
            if id(schema) in self._seen:
                continue
            self._seen.add(id(schema))
            _check_sizes(schema, where)
            for rule in _RULES:
                rule(schema, where)
            _check_sizes(schema, where)
            if self._closed and ("properties" in schema or schema.get("type") == "object"):
                schema.setdefault("additionalProperties", False)
            self.nodes.append(Node(schema, num_arrays))
            more = num_arrays + ("maxItems" not in schema)
            pending += [
                (child, f"{where}/{path}", more if path == "items" else num_arrays)
                for path, child in subschemas(schema)
                if isinstance(child, dict)
            ]


def subschemas(schema: Schema) -> Iterator[tuple[str, Any]]:
    """Yield (path, subschema) of every keyword that holds schemas."""
    for word in _ONE:
        if isinstance(schema.get(word), dict):
            yield word, schema[word]
    for word in _LISTS:
        if isinstance(schema.get(word), list):
            yield from ((f"{word}/{index}", child) for index, child in enumerate(schema[word]))
    for word in _MAPS:
        if isinstance(schema.get(word), dict):
            yield from (
                (f"{word}/{name.replace('~', '~0').replace('/', '~1')}", child) for name, child in schema[word].items()
            )


def merged(root: Schema, nodes: list[Node]) -> set[int]:
    """The schemas of a value that has several schemas, by identity."""
    # a type alone contradicts no bounds of its cases
    speaking = [(node.schema, SPEAKING & set(node.schema) - {"type"}) for node in nodes]
    pending = [schema for schema, words in speaking if COMBINING & words and len(words) > 1]
    pending += [node.schema for node in nodes if len(node.schema.get("allOf", ())) > 1]
    return reached(root, pending, subschemas)


def _check_sizes(schema: Schema, place: str) -> None:
    for word, most in _MOST.items():
        entries = schema.get(word)
        if isinstance(entries, dict | list) and len(entries) > most:
            raise SchemaRefused(place, f"{word} may have at most {most} entries, found {len(entries)}.")


def _drop_annotations(schema: Schema, place: str) -> None:
    for word in _ANNOTATIONS:
        schema.pop(word, None)
    if "format" in schema and not (isinstance(schema["format"], str) and schema["format"] in FORMATS):
        del schema["format"]


def _take_only_case(schema: Schema, place: str) -> None:
    """A single case is no choice."""
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list) and len(schema[word]) == 1:
            schema["allOf"] = [*schema.get("allOf", ()), *schema.pop(word)]


def _modernise(schema: Schema, place: str) -> None:
    """Convert drafts 4 to 2019-09 to 2020-12."""
    if isinstance(schema.get("items"), list):
        schema["prefixItems"] = schema.pop("items")
        if "additionalItems" in schema:
            schema["items"] = schema.pop("additionalItems")
    schema.pop("additionalItems", None)
    if isinstance(schema.get("properties"), dict):
        # draft 3 marks a required property in its own schema
        marked = [key for key, child in schema["properties"].items() if _pop_flag(child, "required")]
        if marked:
            listed = schema.get("required")
            schema["required"] = list(dict.fromkeys([*(listed if isinstance(listed, list) else []), *marked]))
    if isinstance(schema.get("required"), bool):
        del schema["required"]
    dependencies = schema.pop("dependencies", None)
    if isinstance(dependencies, dict):
        for key, value in dependencies.items():
            word = "dependentRequired" if isinstance(value, list) else "dependentSchemas"
            schema.setdefault(word, {})[key] = value


def _pop_flag(child: Any, word: str) -> bool:
    if isinstance(child, dict) and isinstance(child.get(word), bool):
        return bool(child.pop(word))
    return False


def _check_types(schema: Schema, place: str) -> None:
    kinds = schema.get("type")
    for kind in [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []:
        if kind not in _TYPES:
            raise SchemaRefused(place, f"type must be one of {', '.join(_TYPES)}, found {kind!r}.")


def narrow(schema: Schema, place: str = "") -> None:
    """Drop, in place, keywords about types that `type` excludes."""
    kinds = kinds_of(schema)
    for own, words in _WORDS_OF.items():
        if kinds and not kinds & own:
            for word in words & set(schema):
                del schema[word]


def _formats(schema: Schema, place: str) -> None:
    """Add the lengths that a format implies and the library does not count."""
    if schema.get("format") in ("email", "hostname"):
        most = schema.get("maxLength", _MOST_OF_NAME)
        schema["maxLength"] = min(most, _MOST_OF_NAME) if isinstance(most, int) else most
        if schema["format"] == "email":
            schema.setdefault("pattern", _EMAIL)


def _numbers(schema: Schema, place: str) -> None:
    for word in _COUNTS:
        if isinstance(schema.get(word), float) and schema[word].is_integer():
            schema[word] = int(schema[word])
    try:
        rewrite_values(schema)
        rewrite_numbers(schema)
    except ValueError as error:
        raise SchemaRefused(place, str(error)) from None


def _constraint(schema: Schema, added: Schema) -> None:
    """Require `added` too."""
    schema.setdefault("allOf", [])
    schema["allOf"] = [*schema["allOf"], added]


def _dependent(schema: Schema, place: str) -> None:
    """Dependencies of a property: it is absent, or its dependencies hold."""
    for key, names in (schema.pop("dependentRequired", None) or {}).items():
        if names:
            _constraint(schema, {"anyOf": [{"properties": {key: False}}, {"required": list(names)}]})
    for key, child in (schema.pop("dependentSchemas", None) or {}).items():
        if child is not True and child != {}:
            _constraint(schema, {"anyOf": [{"properties": {key: False}}, child]})


def _negation(schema: Schema, place: str) -> None:
    """A few negations have a positive form."""
    if "not" not in schema:
        return
    negated = schema["not"]
    words = set(negated) if isinstance(negated, dict) else set()
    if negated is False:
        pass
    elif words == {"required"} and schema.get("type") == "object":
        names = negated["required"]
        _constraint(schema, {"anyOf": [{"properties": {name: False}} for name in names]})
    elif (
        words == {"anyOf"}
        and schema.get("type") == "object"
        and all(
            isinstance(option, dict) and set(option) == {"required"} and len(option["required"]) == 1
            for option in negated["anyOf"]
        )
    ):
        _constraint(schema, {"properties": {option["required"][0]: False for option in negated["anyOf"]}})
    elif words == {"type"}:
        refused = [negated["type"]] if isinstance(negated["type"], str) else negated["type"]
        present = schema.get("type", [kind for kind in _TYPES if kind != "integer"])
        kept = [kind for kind in ([present] if isinstance(present, str) else present) if kind not in refused]
        if "integer" in refused and "number" in kept:
            raise SchemaRefused(place, "not: no grammar can enforce it.")
        if "number" in refused:
            kept = [kind for kind in kept if kind != "integer"]
        schema["type"] = kept
    elif words in ({"enum"}, {"const"}) and isinstance(schema.get("enum"), list):
        out = negated.get("enum", [negated.get("const")])
        schema["enum"] = [value for value in schema["enum"] if not any(_equal(value, other) for other in out)]
    else:
        raise SchemaRefused(place, "not: no grammar can enforce it. Say what is allowed instead.")
    del schema["not"]


def _equal(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _names(schema: Schema, place: str) -> None:
    """Property names by a pattern, if the object constrains names in no other way."""
    rule = schema.pop("propertyNames", None)
    if rule in (None, True, {}) or rule == {"type": "string"}:
        return
    rest = {word: value for word, value in rule.items() if (word, value) != ("type", "string")} if rule else {}
    _drop_annotations(rest, place)
    values = schema.get("additionalProperties", True)
    if schema.get("properties") or schema.get("patternProperties") or rule is False:
        raise SchemaRefused(place, "propertyNames beside properties or patternProperties: no grammar can enforce it.")
    if set(rest) == {"pattern"}:
        schema["patternProperties"] = {rest["pattern"]: values}
    elif rest and set(rest) <= {"minLength", "maxLength"}:
        most = rest.get("maxLength", "")
        schema["patternProperties"] = {f"^(?s:.{{{rest.get('minLength', 0)},{most}}})$": values}
    elif set(rest) == {"enum"} and all(isinstance(name, str) for name in rest["enum"]):
        schema["properties"] = dict.fromkeys(rest["enum"], values)
    elif rest:
        raise SchemaRefused(place, f"propertyNames with {', '.join(sorted(rest))}: no grammar can enforce it.")
    if rest:
        schema["additionalProperties"] = False


def _counts(schema: Schema, place: str) -> None:
    """Minimum and maximum numbers of properties, where they follow from the required ones."""
    names = schema.get("properties")
    if not isinstance(names, dict) or not names:
        return
    required = set(schema.get("required") or ())
    if set(names) <= required:
        return
    most, least = schema.get("maxProperties"), schema.get("minProperties")
    is_open = bool(schema.get("patternProperties")) or schema.get("additionalProperties", True) is not False
    if isinstance(most, int) and most >= len(set(names) | required):
        del schema["maxProperties"]
        if is_open:
            schema["additionalProperties"] = False
            schema.pop("patternProperties", None)
    if isinstance(least, int) and least <= len(required):
        del schema["minProperties"]
    elif least == 1:
        del schema["minProperties"]
        _constraint(schema, {"anyOf": [{"required": [name]} for name in names]})


def _unevaluated(schema: Schema, place: str) -> None:
    """Without other keywords that evaluate, the same as its older sibling."""
    combining = (COMBINING | {"if"}) & set(schema)
    for word, sibling in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        value = schema.get(word)
        if value is None:
            continue
        if value is True or value == {}:
            pass
        elif combining:
            raise SchemaRefused(place, f"{word} beside {', '.join(sorted(combining))}: no grammar can enforce it.")
        else:
            schema.setdefault(sibling, value)
        del schema[word]


def _arrays(schema: Schema, place: str) -> None:
    if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
        schema.pop("uniqueItems", None)
    if "contains" not in schema:
        for word in ("minContains", "maxContains"):
            schema.pop(word, None)


def _conditions(schema: Schema, place: str) -> None:
    if "if" not in schema:
        for word in ("then", "else"):
            schema.pop(word, None)
        return
    if schema.get("then", True) in (True, {}) and schema.get("else", True) in (True, {}):
        for word in ("if", "then", "else"):
            schema.pop(word, None)
        return
    raise SchemaRefused(place, "if: no grammar can enforce it. Write the cases as anyOf.")


def _patterns(schema: Schema, place: str) -> None:
    """A single pattern that matches every name is the same as additionalProperties."""
    rules = schema.get("patternProperties")
    if isinstance(rules, dict) and len(rules) == 1 and not schema.get("properties"):
        [(pattern, values)] = rules.items()
        if re.fullmatch(r"\^?\.[*+]\$?|", pattern) and "additionalProperties" not in schema:
            del schema["patternProperties"]
            schema["additionalProperties"] = values


_RULES: tuple[Callable[[Schema, str], None], ...] = (
    _drop_annotations, _take_only_case, _modernise, _check_types, narrow, _formats, _numbers, _negation, _conditions,
    _unevaluated, _names, _dependent, _counts, _arrays, _patterns,
)  # fmt: skip
