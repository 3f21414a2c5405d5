"""A form that is refused is refused in one sentence that names field, place and reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sempre.engine import RequestError, StructuredOutputsParams
from sempre.engine.frontend.grammars import GrammarBuilder
from sempre.engine.text.tokenizer import Tokenizer


def refusal(tokenizer: Tokenizer, **form: Any) -> str:
    with pytest.raises(RequestError) as caught:
        GrammarBuilder(tokenizer).build(StructuredOutputsParams(**form), 300, [1], 50)
    assert str(caught.value.parameter).startswith("structured_outputs.")
    return str(caught.value)


PATTERN = {"type": "string", "pattern": "a{3,1}"}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "(abc"}, "regex is refused: character 1 ('('): unclosed group."),
        ({"regex": "a{3,1}"}, "regex is refused: character 2 ('{3,1}'): invalid repetition count range"),
        # the place is that of the user's own text, not of what the library is given for it
        ({"regex": "a/b\n(c"}, "regex is refused: character 5 ('('): unclosed group."),
        ({"regex": r"\d/é{3,1}"}, "regex is refused: character 5 ('{3,1}'): invalid"),
        ({"regex": r"\bword"}, "regex is refused: it looks at the text around a match"),
        ({"regex": "(?=a)b"}, "regex is refused: character 1 ('(?='): look-around"),
        ({"regex": "ab\\"}, "regex is refused: it ends with a backslash that escapes nothing."),
        ({"json": {"type": "array", "items": PATTERN}}, "json is refused: regular expression 'a{3,1}', character 2"),
        (
            {"json_object": True, "whitespace_pattern": "(a"},
            "json_object is refused: whitespace_pattern '(a', character",
        ),
        ({"grammar": "start: foo"}, 'grammar is refused: line 1, column 8: unknown name: "foo".'),
        (
            {"grammar": "start: /(a/"},
            "grammar is refused: line 1, column 8: regular expression '(a', character 1 ('(')",
        ),
        ({"grammar": "root ::= foo"}, "grammar is refused: Rule 'foo' not found."),
        ({"grammar": 'x ::= "a"'}, "grammar is refused: No 'root' rule found."),
    ],
)
def test_one_sentence(byte_level: Tokenizer, form: dict[str, Any], said: str) -> None:
    text = refusal(byte_level, **form)
    assert text.startswith(f"structured_outputs.{said}")
    assert re.fullmatch(r"[^\n]*\.", text), "one line"
    assert not re.search(r"\^|parse error|start: /", text), "no drawing"


def test_an_escaped_backslash_may_end_an_expression(byte_level: Tokenizer) -> None:
    assert GrammarBuilder(byte_level).build(StructuredOutputsParams(regex="a\\\\"), 300, [1], 50)
