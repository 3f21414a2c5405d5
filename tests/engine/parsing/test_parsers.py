"""Pieces of a text do not depend on its chunks, and say what plain code without chunks says of the whole text."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sempre.engine.parsing import OutputParser, ParsedMessage, ToolCall, assemble
from sempre.engine.parsing.output_parser import reasoning_splitter
from sempre.engine.parsing.reasoning import PromptReasoning, ReasoningSplitter, opens_reasoning
from sempre.engine.parsing.tool_calls import HermesParser, Llama3JsonParser, NamedCallParser, RequiredCallsParser
from sempre.engine.text.tokenizer import Tokenizer


def make(kind: str) -> OutputParser:
    tools = {
        "hermes": HermesParser,
        "llama3_json": Llama3JsonParser,
        "required": RequiredCallsParser,
        "named": lambda: NamedCallParser("f"),
        "named thinking": lambda: NamedCallParser("f"),
        "hermes one": HermesParser,
        "hermes thinking": HermesParser,
    }.get(kind)
    reasoning = None
    if "think" in kind or kind == "inside":
        reasoning = ReasoningSplitter(inside=kind == "inside")
    return OutputParser(reasoning, tools() if tools else None, one_call=kind == "hermes one")


KINDS = ["hermes", "hermes one", "hermes thinking", "llama3_json", "required", "named", "named thinking", "thinking"]
KINDS += ["inside"]


def parsed(kind: str, *chunks: str) -> ParsedMessage:
    parser = make(kind)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return assemble([*pieces, *parser.finish()])


CALL = '{"name": "f", "arguments": {"a": [1, "}]</tool_call>\\""]}}'
FRAGMENTS = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", ";", "\n", " ", "[", "]", ",", "{", "}",
        '"', ":", "\\", "<", "<thi", "</tool", "Hello", "é", "null", "7", '"name"', '"arguments"', '"parameters"',
        "}</tool_call>", '"{}"', '"f"', '{"name": "f"', '{"name": "", ', CALL, f"<tool_call>\n{CALL}\n</tool_call>",
        '{"name": "g", "parameters": {}}', '{"parameters": {"b": {}}, "name": "h"}',
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=9).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=80)
def test_chunks_do_not_affect_the_result(kind: str, data: st.DataObject) -> None:
    text = data.draw(TEXTS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parsed(kind, text)
    assert parsed(kind, *chunks) == whole
    assert parsed(kind, *text) == whole


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=100)
def test_pieces_come_in_order(kind: str, text: str) -> None:
    """A call begins before its arguments come, calls are numbered from 0, no piece is empty."""
    parser = make(kind)
    begun = 0
    for piece in [*(p for character in text for p in parser.feed(character)), *parser.finish()]:
        index = getattr(piece, "index", None)
        if type(piece).__name__ == "CallStart":
            assert index == begun
            begun += 1
        else:
            assert index is None or index == begun - 1
        assert getattr(piece, "text", "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
NAMES = st.text(min_size=1, max_size=8)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
DUMPS = st.sampled_from([json.dumps, lambda v: json.dumps(v, indent=1), lambda v: json.dumps(v, ensure_ascii=False)])
FORMATS = {
    "hermes": ("arguments", "<tool_call>\n", "\n</tool_call>", "\n"),
    "llama3_json": ("parameters", "", "", "; "),
}


@pytest.mark.parametrize("kind", ["hermes", "llama3_json", "required"])
@given(calls=CALLS, dumps=DUMPS, backwards=st.booleans())
@settings(max_examples=60)
def test_well_formed_calls(
    kind: str, calls: list[tuple[str, dict[str, object]]], dumps: object, backwards: bool
) -> None:
    assert callable(dumps)
    key, start, end, between = FORMATS.get(kind, ("parameters", "", "", ", "))
    objects = [
        {key: arguments, "name": name} if backwards else {"name": name, key: arguments} for name, arguments in calls
    ]
    text = between.join(start + dumps(item) + end for item in objects)
    message = parsed(kind, *(f"[{text}]" if kind == "required" else text))
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls
    assert message.content is None


@given(text=TEXTS, inside=st.booleans())
@settings(max_examples=100)
def test_reasoning_is_what_a_regular_expression_finds(text: str, inside: bool) -> None:
    begin = re.fullmatch(r"\s*<think>(.*)", text, re.DOTALL)
    expected = ParsedMessage()
    if begin or inside:
        reasoning, _, content = (begin[1] if begin else text).partition("</think>")
        expected = ParsedMessage(content or None, reasoning or None)
    elif text:
        expected = ParsedMessage(text)
    assert parsed("inside" if inside else "thinking", text) == expected


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("hermes", "Hello.", ParsedMessage("Hello.")),
        ("hermes", "\n\n", ParsedMessage("\n\n")),
        ("hermes", f"<tool_call>{CALL}</tool_call>", ParsedMessage(tool_calls=[ToolCall("f", CALL[27:-1])])),
        (
            "hermes",
            'Let me see.\n<tool_call>{"name": "f"}</tool_call>\n and {"x": 1}',
            ParsedMessage('Let me see.\n\n and {"x": 1}', tool_calls=[ToolCall("f", "{}")]),
        ),
        (
            "hermes",  # cut by max_tokens
            '<tool_call>{"name": "f", "arguments": {"a": "b',
            ParsedMessage(tool_calls=[ToolCall("f", '{"a": "b')]),
        ),
        ("hermes", '<tool_call>{"name": "f', ParsedMessage('<tool_call>{"name": "f')),
        ("hermes", "<tool_call>oh no</tool_call>", ParsedMessage("<tool_call>oh no</tool_call>")),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>!',
            ParsedMessage("!", tool_calls=[ToolCall("f", '{"a": 1]}')]),
        ),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}', ParsedMessage('<tool_call>{"name": 3, "arguments": {}}')),
        (
            "hermes one",
            f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>",
            ParsedMessage(tool_calls=[ToolCall("f", CALL[27:-1])]),
        ),
        (
            "hermes thinking",
            f"<think>\n<tool_call>?\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>",
            ParsedMessage(reasoning="\n<tool_call>?\n", tool_calls=[ToolCall("f", CALL[27:-1])]),
        ),
        (  # a missing last bracket
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>\nSo.',
            ParsedMessage("\nSo.", tool_calls=[ToolCall("f", '{"a": 1}')]),
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}</tool_call>!',
            ParsedMessage("!", tool_calls=[ToolCall("f", '{"a": {"b": 1}')]),
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": </tool_call><tool_call>{"name": "g", </tool_call>',
            ParsedMessage(tool_calls=[ToolCall("f", "{}"), ToolCall("g", "{}")]),
        ),
        ("hermes", '<tool_call>{"name": "f"</tool_call>', ParsedMessage(tool_calls=[ToolCall("f", "{}")])),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": null</tool_call>'
            '<tool_call>{"name": "g", "arguments": null}</tool_call>',
            ParsedMessage(tool_calls=[ToolCall("f", "{}"), ToolCall("g", "{}")]),
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": null, "parameters": {"a": 1}}</tool_call>',
            ParsedMessage(tool_calls=[ToolCall("f", '{"a": 1}')]),
        ),
        (
            "hermes",  # one bracket too many, and the newline before the end tag
            '<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>Done.',
            ParsedMessage("Done.", tool_calls=[ToolCall("f", "{}")]),
        ),
        ("hermes", f"<tool_call>{CALL}\n", ParsedMessage(tool_calls=[ToolCall("f", CALL[27:-1])])),
        (
            "hermes",  # no end tag
            f"<tool_call>{CALL}\n\nThat was all.",
            ParsedMessage("\n\nThat was all.", tool_calls=[ToolCall("f", CALL[27:-1])]),
        ),
        (
            "hermes",  # no end tag between two calls
            f"<tool_call>{CALL}\n<tool_call>{CALL}</tool_call>",
            ParsedMessage(tool_calls=[ToolCall("f", CALL[27:-1])] * 2),
        ),
        (
            "hermes",  # JSON text in a string, as OpenAI's interface has it
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            ParsedMessage(tool_calls=[ToolCall("f", '{"a": 1}')]),
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": "a', ParsedMessage(tool_calls=[ToolCall("f", '"a')])),
        ("hermes", '<tool_call>{"name": "f", "arguments": nul', ParsedMessage(tool_calls=[ToolCall("f", "")])),
        (
            "llama3_json",
            '{"name": "f", "parameters": {"a": 1}; {"name": "g", "parameters": null}}; {"name": "h"}',
            ParsedMessage(tool_calls=[ToolCall("f", '{"a": 1}'), ToolCall("g", "{}"), ToolCall("h", "{}")]),
        ),
        ("llama3_json", '{"name": "f", "parameters": null}}\n', ParsedMessage(tool_calls=[ToolCall("f", "{}")])),
        ("hermes thinking", "<think>a</think>\n\nb", ParsedMessage("\n\nb", "a")),
        ("llama3_json", 'Well, {"name": "f"}', ParsedMessage('Well, {"name": "f"}')),
        ("llama3_json", '{"answer": 42}', ParsedMessage('{"answer": 42}')),
        (
            "llama3_json",
            '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}};',
            ParsedMessage(tool_calls=[ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")]),
        ),
        ("required", '[{"name": "f", "parameters": {"a', ParsedMessage(tool_calls=[ToolCall("f", '{"a')])),
        (
            "required",  # cut by max_tokens
            '[{"name": "f", "parameters": {}}, {"name',
            ParsedMessage(tool_calls=[ToolCall("f", "{}")]),
        ),
        ("required", '[{"name": "f", "parameters": {}},', ParsedMessage(tool_calls=[ToolCall("f", "{}")])),
        ("named", ' {"a": 1}', ParsedMessage(tool_calls=[ToolCall("f", '{"a": 1}')])),
        ("named thinking", "<think>a</think>{}", ParsedMessage(reasoning="a", tool_calls=[ToolCall("f", "{}")])),
        ("named thinking", '{"a": 1}', ParsedMessage(tool_calls=[ToolCall("f", '{"a": 1}')])),
        ("named thinking", "<think>Once", ParsedMessage(reasoning="Once")),
    ],
)
def test_examples(kind: str, text: str, expected: ParsedMessage) -> None:
    assert parsed(kind, *text) == expected


def test_arguments_come_while_they_are_generated() -> None:
    parser = HermesParser()
    parser.feed('<tool_call>{"name": "f", "arguments": {"text": "')
    assert [piece.text for piece in parser.feed("so")] == ["so"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("Who?<|im_end|>assistant\n", False),
        ("Who?<|im_end|>assistant\n<think>\n", True),
        ("Who?<|im_end|>assistant\n<think>\n\n</think>\n\n", None),
        # an answer that is to be continued
        ("Who?<|im_end|>assistant\n<think>\nLet me see:", True),
        ("Who?<|im_end|>assistant\n<think>One.</think>It is", None),
        ("Who?<|im_end|><think>One.</think><think>Two", True),
        # what was said in other turns is no reasoning
        ("What is <think>?<|im_end|>assistant\n", False),
        ("What is </think>?<|im_end|>assistant\nIt", False),
        # no turns: only what ends the prompt counts
        ("Think.<think>\n", True),
        ("Think.<think>\n\n</think>\n\n", None),
        ("What is <think>?", False),
        ("</think> said the user", False),
    ],
)
def test_the_prompt_tells_where_an_output_begins(byte_level: Tokenizer, prompt: str, opened: bool | None) -> None:
    assert opens_reasoning(byte_level, byte_level.encode(prompt)) is opened
    for name, begins_inside in (("qwen3", False), ("deepseek_r1", True)):
        for is_bound in (False, True):
            splitter = reasoning_splitter(name, opened, is_bound=is_bound)
            if opened is None:
                assert splitter is None
                continue
            assert splitter is not None
            # an answer that has a form shows it from its first token
            is_reasoning = opened or (begins_inside and not is_bound)
            message = assemble([*splitter.feed('{"a": 1}'), *splitter.finish()])
            assert message == (ParsedMessage(reasoning='{"a": 1}') if is_reasoning else ParsedMessage('{"a": 1}'))


def test_a_prompt_is_asked_once(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    decode = byte_level.decode
    monkeypatch.setattr(byte_level, "decode", lambda ids, **how: asked.append(ids) or decode(ids, **how))
    prompt = PromptReasoning(byte_level, byte_level.encode("Who?<|im_end|>assistant\n<think>\n"))
    assert not asked, "only where somebody asks"
    assert prompt.opened
    assert prompt.opened
    assert len(asked) == 1
