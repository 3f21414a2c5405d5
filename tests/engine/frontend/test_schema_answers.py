"""Schemas of any words: what is accepted gives answers that fulfil the schema and end, whatever a model prefers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import schema_generator
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sempre.engine import StructuredOutputsParams
from sempre.engine.frontend.grammars import GrammarBuilder
from sempre.engine.models.resolve import resolve_model
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError

MODEL = Tokenizer.from_folder(resolve_model("tiny").path)
BUILDER = GrammarBuilder(MODEL)
VOCABULARY, ENDS = 4096, [0, 2]
TOKENIZER = LLTokenizer(MODEL.to_json(), n_vocab=VOCABULARY, eos_token=ENDS)
MAX_TOKENS = 200


def answer(grammar: str, seed: int) -> str | None:
    """What a model says for which all tokens are alike; None if it does not come to an end."""
    generator = np.random.default_rng(seed)
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    token_ids: list[int] = []
    while len(token_ids) < MAX_TOKENS:
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        assert not matcher.is_error(), matcher.get_error()
        assert len(allowed)
        token_id = int(generator.choice(allowed))
        if token_id in ENDS:
            return TOKENIZER.decode_bytes(token_ids).decode(errors="replace")
        assert matcher.consume_token(token_id)
        token_ids.append(token_id)
    return None


def _as_enforced(schema: Any) -> Any:
    """`oneOf` is taken for `anyOf`."""
    if isinstance(schema, list):
        return [_as_enforced(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {word: value if word in ("enum", "const") else _as_enforced(value) for word, value in schema.items()}
    if "oneOf" in made:
        made["allOf"] = [*made.get("allOf", ()), {"anyOf": made.pop("oneOf")}]
    return made


def check(indices: range) -> Counter[str]:
    """Try schemas; return how many answers there were of each kind."""
    found: Counter[str] = Counter()
    for index in indices:
        schema = schema_generator.schema(index)
        try:
            form = StructuredOutputsParams(json=json.dumps(schema))
            grammar = BUILDER.build(form, VOCABULARY, ENDS, MAX_TOKENS)
        except RequestError:
            found["refused"] += 1
            continue
        try:
            validator = jsonschema_rs.Draft202012Validator(_as_enforced(schema), validate_formats=True)
        except jsonschema_rs.ValidationError:
            found["of no meaning"] += 1  # a reference to nothing in a part that is not used
            continue
        for seed in range(2):
            text = answer(grammar, seed)
            found["endless" if text is None else "whole"] += 1
            if text is not None:
                assert validator.is_valid(json.loads(text)), (index, schema, text)
    return found


def test_answers_fulfil_their_schemas() -> None:
    found = check(range(250))
    assert found["endless"] == 0
    assert found["whole"] > found["refused"] > 0


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}},
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "maxProperties": 9},
        {"type": "object", "patternProperties": {"^a": {}, "^b": {}}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"^a": True}, "minProperties": 3},
    ],
)
def test_free_values_under_patterns_of_names_end(schema: dict[str, Any]) -> None:
    """Each takes its part of the answer's room."""
    grammar = BUILDER.build(StructuredOutputsParams(json=schema), VOCABULARY, ENDS, MAX_TOKENS)
    validator = jsonschema_rs.Draft202012Validator(schema)
    for seed in range(12):
        text = answer(grammar, seed)
        assert text is not None
        assert validator.is_valid(json.loads(text))


@pytest.mark.product
@pytest.mark.timeout(1800)
def test_many_answers_fulfil_their_schemas() -> None:
    found = check(range(250, 10_000))
    # where a value has several schemas and is an object in one, not every name is bounded
    assert found["endless"] < 0.005 * found["whole"], found
