"""Schemas of arbitrary words and numbers: what is accepted can be generated to its end, all else is refused with a
message.

Some numbers crash the library's process; a risky schema is tried in a separate one.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits

from sempre.engine import StructuredOutputsParams
from sempre.engine.frontend.grammars import GrammarBuilder, byte_tokenizer
from sempre.engine.models.resolve import resolve_model
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError, RequestError

BUILDER = GrammarBuilder(Tokenizer.from_folder(resolve_model("tiny").path))
END = 256

# where float64, int64 and uint64 lose or end
NUMBERS = [0, 1, -1, 7, 0.5, -0.5, 1e-9, 99.99, 4093, 9999, 10**5, 2**31, 2**53 - 1, 2**53, 2**53 + 1, -(2**53) - 1]
NUMBERS += [2**62 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 1e19, -1e19, 1e300, -1e300, 10**30]
COUNTS = [0, 1, 2, 1.0, 100, 10**5, 2**32, -1]
PATTERNS = ["^a", "^[a-z]+$", ".*", r"\d{3}", "(a|b)*", "^(?:ab){2,5}$", "(a", ".{0,1000}", "(a{1,50}){1,50}"]
NAMES = ["a", "b", "é", "", '"', "\\"]
KINDS = ["string", "number", "integer", "object", "array", "boolean", "null"]

number = st.sampled_from(NUMBERS)
count = st.sampled_from(COUNTS)
values = number | st.sampled_from(["x", "", None, True, [1], {"a": 2}])


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    lists = st.lists(inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(KINDS) | st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True),
            "minimum": number,
            "maximum": number,
            "exclusiveMinimum": number,
            "exclusiveMaximum": number,
            "multipleOf": number,
            "minLength": count,
            "maxLength": count,
            "pattern": st.sampled_from(PATTERNS),
            "format": st.sampled_from(["date", "email", "uuid", "ipv6", "foo"]),
            "items": inner,
            "prefixItems": lists,
            "minItems": count,
            "maxItems": count,
            "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            "required": st.lists(st.sampled_from(NAMES), max_size=2, unique=True),
            "additionalProperties": inner,
            "patternProperties": st.dictionaries(st.sampled_from(PATTERNS), inner, max_size=1),
            "minProperties": count,
            "maxProperties": count,
            "anyOf": lists,
            "allOf": lists,
            "oneOf": lists,
            "enum": st.lists(values, max_size=3),
            "const": values,
            "$ref": st.sampled_from(["#", "#/$defs/d", "#/$defs/missing"]),
        },
    )


def _few(schema: dict[str, Any], seed: int) -> dict[str, Any]:
    """A few of the words: of many, two contradict each other nearly always."""
    generator = random.Random(seed)
    names = list(schema)
    return {name: schema[name] for name in generator.sample(names, min(len(names), generator.randint(1, 4)))}


LEAVES = st.builds(_few, _schemas(st.just(True)), st.integers(0, 10**6))
SCHEMAS = st.builds(_few, _schemas(LEAVES | st.booleans()), st.integers(0, 10**6))


def follow(grammar: str, seed: int, closes: float = 0.1, most: int = 60) -> None:
    """Write by the grammar, byte by byte; where something may be closed, it is with probability `closes`."""
    generator = random.Random(seed)
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    text = bytearray()
    while len(text) < most:
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        assert not matcher.is_error(), (matcher.get_error(), bytes(text))
        assert len(allowed), bytes(text)
        closing = [byte for byte in allowed.tolist() if byte == END or chr(byte) in '"}]']
        byte = generator.choice(closing if closing and generator.random() < closes else allowed.tolist())
        if byte == END:
            return
        assert matcher.consume_token(byte), bytes(text)
        text.append(byte)


def check(schema: dict[str, Any], definition: Any, max_tokens: int) -> None:
    text = json.dumps({**schema, "$defs": {"d": definition}})
    try:
        grammar = BUILDER.build(StructuredOutputsParams(json=text), 4096, [0, 2], max_tokens)
    except (RequestError, ConfigError):
        return
    for seed, closes in enumerate((0.6, 0.05)):
        follow(grammar, seed, closes)


ARGUMENTS = {"schema": SCHEMAS, "definition": LEAVES | st.booleans(), "max_tokens": st.sampled_from([5, 200, 4000])}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(**ARGUMENTS)
def test_what_is_accepted_can_be_followed(schema: dict[str, Any], definition: Any, max_tokens: int) -> None:
    check(schema, definition, max_tokens)


@pytest.mark.product
@pytest.mark.timeout(1800)
@settings(max_examples=5000, deadline=None, derandomize=True)
@given(**ARGUMENTS)
def test_what_is_accepted_can_be_followed_at_length(schema: dict[str, Any], definition: Any, max_tokens: int) -> None:
    check(schema, definition, max_tokens)


FATAL = [
    {"json": {"const": [-(2**63)]}},
    {"json": {"const": -9.3e18}},
    {"json": {"type": "integer", "enum": [-1e300, 4]}},
    # reached by a reference that only the library resolves
    {
        "json": {
            "$id": "https://example.com/r",
            "$ref": "https://example.com/r#/x/y",
            "x": {"y": {"const": [-(2**63)]}},
        }
    },
    {"grammar": 'start: %json {"const": -9223372036854775808}'},
    {"grammar": 'start: "a" | part\npart: %json\n  {"type": "integer", "enum": [-1e30]}'},
    {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
]


def test_what_would_end_the_process_is_refused() -> None:
    """In a separate process, which must end."""
    program = (
        "import json, sys\n"
        "from sempre.engine import StructuredOutputsParams\n"
        "from sempre.engine.frontend.grammars import GrammarBuilder\n"
        "from sempre.engine.models.resolve import resolve_model\n"
        "from sempre.engine.text.tokenizer import Tokenizer\n"
        "from sempre.ipc.errors import RequestError\n"
        "builder = GrammarBuilder(Tokenizer.from_folder(resolve_model('tiny').path))\n"
        "for form in json.load(sys.stdin):\n"
        "    try:\n"
        "        builder.build(StructuredOutputsParams(**form), 4096, [0, 2], 200)\n"
        "    except RequestError as error:\n"
        "        print(str(error)[:60])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(FATAL), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(FATAL), done.stdout
    assert all("is refused: " in line for line in lines)


@pytest.mark.parametrize(
    ("multiples", "is_accepted"),
    [([7], True), ([0.01], True), ([4096], True), ([4093, 4096], True), ([10_000], True), ([8193], False),
     ([9999], False), ([99.99], False), ([4096, 4097], False), ([10**5], False)],
)  # fmt: skip
def test_remainders_are_bounded(multiples: list[float], is_accepted: bool) -> None:
    properties = {f"k{i}": {"type": "integer", "multipleOf": multiple} for i, multiple in enumerate(multiples)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    params = StructuredOutputsParams(json=schema)
    if not is_accepted:
        with pytest.raises(RequestError, match="remainders"):
            BUILDER.build(params, 4096, [0, 2], 200)
        return
    follow(BUILDER.build(params, 4096, [0, 2], 200), seed=3)
