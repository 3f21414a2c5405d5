"""Writes schemas as Lark grammars if the grammar library would not keep their numbers exactly.

Numbers become expressions of their digits, and the objects, arrays and cases that hold them become rules; the rest
stays a schema, in a rule of its own.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from sempre.engine.frontend.digit_ranges import integers_between, numbers_between
from sempre.engine.frontend.schema_numbers import EXACT, kinds_of
from sempre.engine.frontend.schema_references import target_of
from sempre.engine.frontend.schemas import KINDS, Schema, subschemas

_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", EXACT}
_OF_OBJECTS = {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
_OF_ARRAYS = {"items", "prefixItems", "minItems", "maxItems"}
_OF_STRINGS = {"minLength", "maxLength", "pattern", "format"}
_ASIDE = {"$defs", "definitions", "x-guidance"}
_NAME = r'/"([^"\\\x00-\x1F\x7F]|\\["\\bfnrt])*"/'
"""A name in the form used for comparison: no unnecessary escapes."""
MAX_TRANSLATED_CHARACTERS = 256 * 1024
"""Maximum characters of a translated form; compiling the largest takes seconds and some tens of megabytes."""
_MOST_LISTED = 1100
"""Maximum numbers listed one by one at an end of a range; in int64 two float64 are up to 1,024 apart."""


class NotKept(Exception):
    """Numbers in a place that no rule here describes."""


class NothingFits(Exception):
    """No value satisfies a schema."""


def has_exact_numbers(schema: Schema) -> bool:
    """Whether the library alone would omit numbers, in a schema or any schema inside it."""
    return any(EXACT in node for node in _all_inside(schema))


def needs_exact_numbers(schema: Schema) -> str | None:
    """Why the library alone cannot handle a schema; None if it can."""
    return next((node[EXACT]["otherwise"] for node in _all_inside(schema) if "otherwise" in node.get(EXACT, ())), None)


def without_marks(schema: Schema) -> Schema:
    """A copy without the EXACT keyword."""
    made = copy.deepcopy(schema)
    for node in _all_inside(made):
        node.pop(EXACT, None)
    return made


def lark_of(root: Schema, options: Schema) -> str:
    """The grammar of a schema; `options` are the library's options, such as white space.

    Raises NotKept and NothingFits.
    """
    rules = _Rules(root, options)
    start = rules.of(root)
    return "\n".join([f"start: {start}", *(f"{name}: {text}" for name, text in rules.texts.items())])


def _all_inside(schema: Schema) -> Iterator[Schema]:
    return _reachable(schema, lambda node: [child for _, child in subschemas(node)])


def _reachable(root: Any, parts_of: Callable[[Schema], list[Any]]) -> Iterator[Schema]:
    """Every schema reachable through `parts_of`, each once; `parts_of` runs after its schema was yielded."""
    pending = [root]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            yield node
            pending += parts_of(node)


class _Rules:
    def __init__(self, root: Schema, options: Schema) -> None:
        self._root = root
        self._options = options
        self._special = self._find_special()
        self._size = 0
        self._names: dict[int, str] = {}
        self._named: list[Schema] = []
        """Keeps objects alive that are tracked by identity."""
        space = options.get("whitespace_pattern") or r"[ \n\r\t]+"
        is_flexible = options.get("whitespace_pattern") is not None or options.get("whitespace_flexible", True)
        gap = f"({_in_slashes(space)})?" if is_flexible else ""
        self.texts = {
            "OPEN": rf"/\{{{gap}/",
            "CLOSE": rf"/{gap}\}}/",
            "FIRST": rf"/\[{gap}/",
            "LAST": rf"/{gap}\]/",
            "COMMA": f"/{gap}{literal(options.get('item_separator', ','))}{gap}/",
            "COLON": f"/{gap}{literal(options.get('key_separator', ':'))}{gap}/",
        }

    def of(self, schema: Any) -> str:
        """The name of the rule for a schema. Raises NotKept and NothingFits."""
        if schema is False:
            raise NothingFits
        if schema is True:
            schema = {}
        name = self._names.get(id(schema))
        if name is None:
            self._named.append(schema)
            name = self._names[id(schema)] = self._add("")
            self.texts[name] = self._text(schema)
        return name

    def _add(self, text: str) -> str:
        name = f"r{len(self.texts)}"
        self.texts[name] = text
        return name

    def _text(self, schema: Schema) -> str:
        if not self._is_special(schema):
            return self._leaf(schema)
        words = set(schema) - _ASIDE
        if words == {"$ref"}:
            return self.of(target_of(self._root, schema["$ref"]))
        if words in ({"anyOf"}, {"oneOf"}) or (words == {"allOf"} and len(schema["allOf"]) == 1):
            return self._any(schema[words.pop()])
        if words - {"type"} - _OF_NUMBERS - _OF_OBJECTS - _OF_ARRAYS - _OF_STRINGS:
            raise NotKept
        kinds = sorted(kinds_of(schema) or KINDS)
        if "number" in kinds and "integer" in kinds:
            kinds.remove("integer")
        return self._of_kind(schema, kinds[0]) if len(kinds) == 1 else self._any([{**schema, "type": k} for k in kinds])

    def _any(self, cases: list[Any]) -> str:
        found = []
        for case in cases:
            try:
                found.append(self.of(case))
            except NothingFits:
                continue
        if not found:
            raise NothingFits
        return " | ".join(found)

    def _is_special(self, schema: Schema) -> bool:
        """Whether the schema or one it refers to contains exact numbers."""
        return _is_exact(schema) or any(id(node) in self._special for node in self._parts_of(schema))

    def _parts_of(self, schema: Schema) -> list[Any]:
        parts = [child for path, child in subschemas(schema) if path.partition("/")[0] not in _ASIDE]
        return [*parts, target_of(self._root, schema["$ref"])] if isinstance(schema.get("$ref"), str) else parts

    def _find_special(self) -> set[int]:
        """The schemas that contain exact numbers, by identity."""
        users: dict[int, list[int]] = {}

        def parts_of(node: Schema) -> list[Any]:
            parts = self._parts_of(node)
            for part in parts:
                users.setdefault(id(part), []).append(id(node))
            return parts

        found = [id(node) for node in _reachable(self._root, parts_of) if _is_exact(node)]
        special: set[int] = set()
        while found:
            at = found.pop()
            if at not in special:
                special.add(at)
                found += users.get(at, ())
        return special

    def _leaf(self, schema: Schema) -> str:
        """Leave a schema to the library, with a copy of everything it refers to."""
        made = _copy(schema)
        definitions: Schema = {}
        names: dict[int, str] = {}

        def parts_of(node: Schema) -> list[Any]:
            copied = []
            if isinstance(node.get("$ref"), str):
                target = target_of(self._root, node["$ref"])
                if not isinstance(target, dict):
                    raise NotKept
                if id(target) not in names:
                    names[id(target)] = f"d{len(names)}"
                    copied.append(definitions.setdefault(names[id(target)], _copy(target)))
                node["$ref"] = f"#/$defs/{names[id(target)]}"
            return [*copied, *(child for _, child in subschemas(node))]

        for node in _reachable(made, parts_of):
            node.pop(EXACT, None)
        if definitions:
            made["$defs"] = definitions
        text = f"%json {json.dumps({**made, 'x-guidance': self._options})}"
        self._size += len(text)
        if self._size > MAX_TRANSLATED_CHARACTERS:
            # every rule has its own copy of the schemas it refers to
            raise NotKept
        return text

    def _of_kind(self, schema: Schema, kind: str) -> str:
        def own(words: set[str]) -> Schema:
            return {word: value for word, value in schema.items() if word in words}

        if kind in ("integer", "number") and EXACT in schema:
            return self._number(kind, own(_OF_NUMBERS))
        if kind == "object":
            return self._object(own(_OF_OBJECTS))
        if kind == "array":
            return self._array(own(_OF_ARRAYS))
        return self._leaf({"type": kind, **own(_OF_STRINGS | _OF_NUMBERS)})

    def _number(self, kind: str, schema: Schema) -> str:
        low, high = _end(schema, "low", "minimum"), _end(schema, "high", "maximum")
        multiple = schema.get("multipleOf")
        if multiple == 1 or (multiple is None and kind == "integer"):
            return _expression(integers_between(low, high))
        if multiple is None:
            return _expression(numbers_between(low, high))
        if kind == "number":
            digits = Decimal(repr(multiple)).normalize().as_tuple()
            if digits.digits != (1,) or not isinstance(digits.exponent, int) or digits.exponent > 0:
                raise NotKept
            return _expression(numbers_between(low, high, -digits.exponent))
        if "otherwise" in schema[EXACT] or low is None or high is None or not isinstance(multiple, int):
            raise NotKept
        inside = {word: schema[word] for word in ("minimum", "maximum", "multipleOf")}
        values: list[str] = []
        for begin, end in ((low, inside["minimum"]), (inside["maximum"] + 1, high + 1)):
            if end - begin > _MOST_LISTED * multiple:
                raise NotKept
            values += map(str, range(-(-begin // multiple) * multiple, end, multiple))
        rest = self._add(self._leaf({"type": "integer", **inside}))
        return f"{rest} | /({'|'.join(values)})/" if values else rest

    def _array(self, schema: Schema) -> str:
        prefix, least, most = schema.get("prefixItems", []), schema.get("minItems", 0), schema.get("maxItems")
        parts: list[tuple[str, bool]] = []
        try:
            for child in prefix[:most]:
                parts.append((self.of(child), len(parts) < least))
            further = None if most == len(parts) else self.of(schema.get("items", True))
        except NothingFits:
            further = None
        if least > (len(parts) if further is None else least if most is None else most):
            raise NothingFits
        return f"FIRST {self._sequence(parts, further, least, most, is_ordered=True)} LAST"

    def _object(self, schema: Schema) -> str:
        named, required = schema.get("properties", {}), schema.get("required", [])
        others, patterns = schema.get("additionalProperties", True), schema.get("patternProperties", {})
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        if len(patterns) > 1 or (patterns and others is not False):
            raise NotKept
        parts: list[tuple[str, bool]] = []
        names = list(dict.fromkeys([*named, *required]))
        for name in names:
            if any(_may_match(pattern, name) for pattern in patterns):
                raise NotKept
            try:
                value = self.of(named.get(name, others))
            except NothingFits:
                if name in required:
                    raise
                continue
            quoted = json.dumps(json.dumps(name, ensure_ascii=False))
            parts.append((self._add(f"{quoted} COLON {value}"), name in required))
        if (least > len(required) or most is not None) and not all(is_required for _, is_required in parts):
            raise NotKept
        further = self._further(names, patterns, others)
        if (most is not None and most < max(least, len(parts))) or (further is None and least > len(parts)):
            raise NothingFits
        return f"OPEN {self._sequence(parts, further, least, most, is_ordered=False)} CLOSE"

    def _further(self, names: list[str], patterns: Schema, others: Any) -> str | None:
        """A rule for one unnamed property; None if none is allowed."""
        try:
            value = self.of(next(iter(patterns.values()), others))
        except NothingFits:
            return None
        if patterns:
            name = self._add(self._leaf({"type": "string", "pattern": next(iter(patterns))}))
        else:
            taken = "|".join(literal(json.dumps(name, ensure_ascii=False)) for name in names)
            name = f"NAME{len(self.texts)}"
            self.texts[name] = _NAME + (f" & ~/{taken}/" if names else "")
        return self._add(f"{name} COLON {value}")

    def _sequence(
        self, parts: list[tuple[str, bool]], further: str | None, least: int, most: int | None, *, is_ordered: bool
    ) -> str:
        """An expression of parts (rule, is required) and then further ones, separated by commas.

        From `least` to `most` in total, if all parts are present. `is_ordered`: a part requires all parts before it.
        """
        first = after = '""'
        least = max(0, least - len(parts))
        if further is not None and most != len(parts):
            limit = "" if most is None else most - len(parts)
            after = self._add(f"(COMMA {further}){{{least},{limit}}}")
            rest = f"{further} (COMMA {further}){{{max(0, least - 1)},{'' if limit == '' else int(limit) - 1}}}"
            first = self._add(rest if least else f'{rest} | ""')
        for rule, is_required in reversed(parts):
            absent = ('""', '""') if is_ordered else (first, after)
            first = self._add(f"{rule} {after}" + ("" if is_required else f" | {absent[0]}"))
            after = self._add(f"COMMA {rule} {after}" + ("" if is_required else f" | {absent[1]}"))
        return first


def _is_exact(schema: Schema) -> bool:
    return EXACT in schema and (not kinds_of(schema) or bool(kinds_of(schema) & {"integer", "number"}))


def _copy(schema: Schema) -> Schema:
    return {word: copy.deepcopy(value) for word, value in schema.items() if word not in _ASIDE}


def _end(schema: Schema, side: str, word: str) -> int | None:
    """The bound of a side as an inclusive integer."""
    text = schema[EXACT][side]
    value = schema.get(word) if text is None else int(text)
    if text is None and (f"exclusive{word.capitalize()}" in schema or (value is not None and int(value) != value)):
        raise NotKept
    return None if value is None else int(value)


def _expression(found: str | None) -> str:
    if found is None:
        raise NothingFits
    return f"/{found}/"


def _may_match(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True


def literal(text: str) -> str:
    """`text` as a part of an expression between slashes."""
    return _in_slashes(re.escape(text))


def _in_slashes(expression: str) -> str:
    return expression.replace("/", r"\/").replace("\n", r"\n")
