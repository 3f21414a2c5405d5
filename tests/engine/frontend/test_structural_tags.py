"""Free text with tagged parts: what the grammar of a structural tag allows, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

import sempre.engine.checkpoints
from sempre.engine import LLM, ConfigError, RequestError, SamplingParams, StructuredOutputsParams
from sempre.engine.frontend.grammars import GrammarBuilder, byte_tokenizer
from sempre.engine.text.tokenizer import Tokenizer

TINY = Path(sempre.engine.checkpoints.__file__).parent / "tiny"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OLDER = {
    "type": "structural_tag",
    "triggers": ["<call"],
    "structures": [
        {"begin": "<call=f>", "schema": SCHEMA, "end": "</call>"},
        {"begin": "<call=g>", "schema": {"type": "boolean"}, "end": "</call>"},
    ],
}


def newer(*tags: dict[str, Any], triggers: list[str], **flags: bool) -> dict[str, Any]:
    return {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags, **flags}}


def tag(begin: str, end: str, **content: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


CALLS = (
    tag("<call=f>", "</call>", type="json_schema", json_schema=SCHEMA),
    tag("<call=g>", "</call>", type="regex", pattern="true|false"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


def grammar(tokenizer: Tokenizer, structural_tag: Any, **more: Any) -> str:
    params = StructuredOutputsParams(structural_tag=structural_tag, **more)
    return GrammarBuilder(tokenizer).build(params, 4096, [0], 100)


def is_allowed(tokenizer: LLTokenizer, form: str, token_ids: list[int]) -> tuple[bool, bool]:
    """Whether the form allows these tokens, and the end after them."""
    matcher = LLMatcher(tokenizer, form, log_level=0)
    return matcher.try_consume_tokens(token_ids) == len(token_ids), matcher.is_accepting()


@pytest.mark.parametrize("given", [OLDER, newer(*CALLS, triggers=["<call"]), json.dumps(OLDER)])
@pytest.mark.parametrize(
    ("text", "allowed", "complete"),
    [
        ("", True, True),
        ("free text, and <cal", True, True),
        ('x <call=f>{"a":1}</call>', True, True),
        ('x <call=f>{"a": 1}</call> y <call=g>true</call> z', True, True),
        ('<call=f>{"a":1}</call><call=g>false</call>', True, True),
        ("x <call", True, False),
        ('<call=f>{"a":1}', True, False),
        ("<call=h>", False, False),
        ('<call=f>{"a":"1"}</call>', False, False),
        ("<call=g>1</call>", False, False),
    ],
)
def test_a_trigger_begins_a_tag(tokenizer: Tokenizer, given: Any, text: str, allowed: bool, complete: bool) -> None:
    found = is_allowed(byte_tokenizer(), grammar(tokenizer, given), list(text.encode()))
    assert found == (allowed, allowed and complete)


@pytest.mark.parametrize(
    ("flags", "text", "complete"),
    [
        ({"at_least_one": True}, "x", False),
        ({"at_least_one": True}, "x <call=g>true</call> y", True),
        ({"stop_after_first": True}, "x", True),
        ({"stop_after_first": True}, "x <call=g>true</call>", True),
        ({"stop_after_first": True}, "x <call=g>true</call> y", None),
        ({"stop_after_first": True, "at_least_one": True}, "x", False),
    ],
)
def test_how_many_tags(tokenizer: Tokenizer, flags: dict[str, bool], text: str, complete: bool | None) -> None:
    form = grammar(tokenizer, newer(*CALLS, triggers=["<call"], **flags))
    allowed, found = is_allowed(byte_tokenizer(), form, list(text.encode()))
    assert (found if allowed else None) == complete


def test_several_triggers(tokenizer: Tokenizer) -> None:
    tags = (tag("<a>", "</a>", type="regex", pattern="1"), tag("[b]", "", type="grammar", grammar='start: "2"'))
    form = grammar(tokenizer, newer(*tags, triggers=["<a>", "["]))
    for text, complete in (("x<a>1</a>y[b]2<a>1</a>", True), ("[b", False), ("<a", True)):
        assert is_allowed(byte_tokenizer(), form, list(text.encode())) == (True, complete)
    assert not is_allowed(byte_tokenizer(), form, list(b"<a>2"))[0]
    assert not is_allowed(byte_tokenizer(), form, list(b"[c"))[0]


def test_special_tokens_in_tags(tokenizer: Tokenizer) -> None:
    """No text matches them: they are meant as tokens."""
    start, end = tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")
    assert len(start) == len(end) == 1
    form = grammar(
        tokenizer,
        newer(
            tag("<|im_start|>f:", "<|im_end|>", type="json_schema", json_schema={"type": "boolean"}),
            triggers=["<|im_start|>"],
        ),
    )
    own = LLTokenizer(tokenizer.to_json(), n_vocab=4096, eos_token=[0])
    text = [tokenizer.encode(part, add_special_tokens=False) for part in ("It is", "f:", "true")]
    for tokens, expected in (
        (text[0], (True, True)),
        ([*text[0], *start, *text[1], *text[2], *end], (True, True)),
        ([*text[0], *start, *text[1], *text[2]], (True, False)),
    ):
        assert is_allowed(own, form, tokens) == expected
    for tokens in ([*start, *text[0]], end):
        assert not is_allowed(own, form, tokens)[0]


def test_a_tag_after_a_beginning(tokenizer: Tokenizer) -> None:
    form = grammar(tokenizer, OLDER, begins_after="###")
    assert is_allowed(byte_tokenizer(), form, list(b"<call=h> ###")) == (True, True)
    assert not is_allowed(byte_tokenizer(), form, list(b"### <call=h>"))[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1]", "must be an object in JSON, got list"),
        ({}, "missing required field `structures`"),
        ({**OLDER, "triggers": []}, "length >= 1 - at `$.triggers`"),
        ({**OLDER, "triggers": ["<other"]}, "no trigger of ['<other'] is the beginning of '<call=f>'"),
        ({**OLDER, "structure": []}, "unknown field `structure`"),
        ({**OLDER, "structures": OLDER["structures"] * 65}, "length <= 128 - at `$.structures`"),  # type: ignore[operator]
        (newer(tag("<a", "", type="any_text"), triggers=["<a"]), "Invalid value 'any_text' - at `$.format.tags[0]"),
        ({"type": "structural_tag", "format": {"type": "sequence"}}, "Invalid value 'sequence'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        StructuredOutputsParams(structural_tag=given)
    assert refused.value.parameter == "structured_outputs.structural_tag"


@pytest.mark.parametrize(
    ("begin", "content", "message"),
    [
        ("<a", {"type": "json_schema", "json_schema": {"type": "objekt"}}, "objekt"),
        ("<a", {"type": "json_schema", "json_schema": "{"}, "is not JSON"),
        ("<a", {"type": "regex", "pattern": "a(?=b)"}, "look-around"),
        ("a<|im_end|>", {"type": "regex", "pattern": "a"}, "a special token that is not at its beginning"),
        ("<a", {"type": "regex", "pattern": "a" * 140_000}, "may have at most 131072 bytes"),
    ],
)
def test_what_cannot_be_kept_is_refused(tokenizer: Tokenizer, begin: str, content: Any, message: str) -> None:
    with pytest.raises((RequestError, ConfigError), match=re.escape(message)):
        grammar(tokenizer, newer(tag(begin, "", **content), triggers=[begin]))


def test_outputs_keep_their_tags() -> None:
    """Whatever was sampled: each trigger begins a tag."""
    fruit = newer(tag("e(", ")", type="json_schema", json_schema={"enum": ["sea", "land"]}), triggers=["e"])
    params = [
        SamplingParams(max_tokens=40, seed=seed, structured_outputs=StructuredOutputsParams(structural_tag=fruit))
        for seed in range(6)
    ]
    with LLM("tiny", multiprocessing=False, max_model_len=256, num_threads=1) as llm:
        outputs = llm.generate(["Chapter 1."] * 6, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in llm.generate(["Chapter 1."] * 2, params[:2], use_tqdm=False)] == [
            o.outputs[0].token_ids for o in outputs[:2]
        ]
    texts = [output.outputs[0].text for output in outputs]
    parts = [part for text in texts for part in re.findall(r'e\("(?:sea|land)"\)', text)]
    assert len(parts) > 6
    for text in texts:
        rest = re.sub(r'e\("(?:sea|land)"\)', "", text)
        assert re.fullmatch(r'[^e]*(e(\(("[a-z]*"?)?)?)?', rest), text
