"""Formats of tool calls: what models' own templates write is read, and pieces do not depend on how a text is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sempre.engine.parsing import CallStart, OutputParser, ParsedMessage, ToolCall, assemble
from sempre.engine.parsing.detection import tool_format_of
from sempre.engine.parsing.output_parser import TOOL_PARSERS
from sempre.engine.server.agents.blocks import Blocks
from sempre.engine.server.config import server_config, with_model_defaults
from sempre.engine.text.chat_template import render_chat
from sempre.ipc.errors import ConfigError

TEMPLATES = Path(__file__).parents[1] / "chat_templates"
SCHEMAS: Any = {
    "f": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "number": {"type": ["number", "null"]},
            "flag": {"type": "boolean"},
            "items": {"type": "array"},
            "object": {"anyOf": [{"type": "object"}, {"type": "null"}]},
            "word": {"enum": ["a", "5"]},
        },
    },
    "g": {"type": "object", "properties": {}},
}


def parser(kind: str) -> OutputParser:
    return OutputParser(None, TOOL_PARSERS[kind](SCHEMAS))


def parsed(kind: str, *chunks: str) -> ParsedMessage:
    made = parser(kind)
    pieces = [piece for chunk in chunks for piece in made.feed(chunk)]
    return assemble([*pieces, *made.finish()])


def blocks(kind: str, *chunks: str) -> list[tuple[str, str, str]]:
    made, found = parser(kind), Blocks(str)
    for chunk in chunks:
        found.add(made.feed(chunk))
    found.add(made.finish())
    found.end(is_cut=False)
    return [(block.kind, block.name, block.text) for block in found.all]


CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DEEPSEEK = ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", CALL, SEP, CALL_END]
FRAGMENTS = {
    "mistral": [
        "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "abc", '[{"name": "f", "arguments": {"a": 1}}', "f{", "]", "[TOOL",
    ],
    "deepseek_v3": [*DEEPSEEK, "function", "f\n", "```json\n", "\n```", "``", "<｜tool"],
    "deepseek_v31": [*DEEPSEEK, "f", "<｜tool"],
    "qwen3_coder": [
        "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=text>", "<parameter=number>",
        "</parameter>", "<function=", "</param", "5", "None", "<tool", "a<b",
    ],
    "pythonic": [
        "[", "]", "f(", ")", "a=", "1", '"x)"', "'", ",", "None", "{", "}", "(", "<|python_start|>", "<|python_end|>",
    ],
}  # fmt: skip
FRAGMENTS["seed_oss"] = [part.replace("tool_call>", "seed:tool_call>") for part in FRAGMENTS["qwen3_coder"]]
COMMON = ["\n", " ", "Hello", "é", '{"a": [1, "}"]}', "{}", "{", "}", "\\"]


@pytest.mark.parametrize("kind", FRAGMENTS)
@given(data=st.data())
@settings(max_examples=100)
def test_chunks_do_not_affect_the_result(kind: str, data: st.DataObject) -> None:
    text = data.draw(st.lists(st.sampled_from([*FRAGMENTS[kind], *COMMON]), max_size=10).map("".join))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parsed(kind, text)
    assert parsed(kind, *chunks) == whole
    assert parsed(kind, *text) == whole
    # the order of content and calls, too
    assert blocks(kind, *text) == blocks(kind, *chunks) == blocks(kind, text)


@pytest.mark.parametrize("kind", ["hermes", "llama3_json"])
@given(data=st.data())
@settings(max_examples=60)
def test_blocks_do_not_depend_on_chunks_either(kind: str, data: st.DataObject) -> None:
    parts = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": 1}}', ";", "<|python_tag|>", *COMMON]
    text = data.draw(st.lists(st.sampled_from(parts), max_size=10).map("".join))
    assert blocks(kind, *text) == blocks(kind, text)


@pytest.mark.parametrize("kind", FRAGMENTS)
@given(data=st.data())
@settings(max_examples=60)
def test_pieces_come_in_order(kind: str, data: st.DataObject) -> None:
    """A call begins before its arguments come, calls are numbered from 0, no piece is empty."""
    text = data.draw(st.lists(st.sampled_from([*FRAGMENTS[kind], *COMMON]), max_size=10).map("".join))
    made, begun = parser(kind), 0
    for piece in [*(p for character in text for p in made.feed(character)), *made.finish()]:
        index = getattr(piece, "index", None)
        if isinstance(piece, CallStart):
            assert index == begun
            begun += 1
        else:
            assert index is None or index == begun - 1
        assert getattr(piece, "text", "x")


ARGUMENTS: list[dict[str, Any]] = [
    {"text": 'two\nlines, "quoted" <b>', "number": 2.5, "flag": True, "items": [1, "a", None], "object": {"k": "v"}},
    {"text": "5", "number": None, "flag": False, "word": "5"},
]
CALLS = [("f", ARGUMENTS[0]), ("f", ARGUMENTS[1]), ("g", {})]
# kind, template, the names of values that the template writes as they are
OWN = [
    ("hermes", "qwen2.5"),
    ("hermes", "qwen3"),
    ("hermes", "granite-4"),
    ("llama3_json", "llama-3"),
    ("mistral", "mistral-nemo"),
    ("mistral", "mistral-small"),
    ("deepseek_v3", "deepseek-r1"),
    ("qwen3_coder", "qwen3-coder"),
    ("seed_oss", "seed-oss"),
]


@pytest.mark.parametrize(("kind", "name"), OWN)
def test_what_a_models_own_template_writes_is_read(kind: str, name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    calls = CALLS[: {"llama-3": 1, "deepseek-r1": 2}.get(name, 3)]
    if name == "seed-oss":
        # its template writes lists and objects as Python does
        calls = [("f", {k: v for k, v in ARGUMENTS[0].items() if k not in ("items", "object")}), *CALLS[1:]]
    user = {"role": "user", "content": "What?"}
    made = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": each, "arguments": arguments}}
        for i, (each, arguments) in enumerate(calls)
    ]
    tools = [{"type": "function", "function": {"name": each, "parameters": SCHEMAS[each]}} for each in SCHEMAS]
    variables: dict[str, Any] = {"tools": tools, "bos_token": "", "eos_token": "<eos>", "date_string": "26 Jul 2024"}
    prompt = render_chat([user], template, **variables)
    results = [{"role": "tool", "tool_call_id": call["id"], "name": "f", "content": "RESULT"} for call in made]
    whole = render_chat(
        [user, {"role": "assistant", "tool_calls": made}, *results], template, add_generation_prompt=False, **variables
    )
    start = "[/INST]" if kind == "mistral" else "<｜Assistant｜>" if "deepseek" in kind else prompt[-20:]
    text = whole[whole.index(start) + len(start) :]
    ends = (
        "<eos>",
        "<seed:eos>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<｜tool▁outputs",
        "[TOOL_RESULTS]",
        "<｜end▁of",
    )
    text = min((text.partition(end)[0] for end in ends), key=len)
    for chunks in ([text], list(text)):
        found = parsed(kind, *chunks)
        assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == calls
        assert found.content is None


def said(content: str | None, calls: list[tuple[str, str]]) -> ParsedMessage:
    return ParsedMessage(content, tool_calls=[ToolCall(*call) for call in calls])


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("mistral", "Hello.", ParsedMessage("Hello.")),
        ("mistral", "[TOOL_CALLS]", ParsedMessage("[TOOL_CALLS]")),
        ("mistral", 'Hi.[TOOL_CALLS]f[ARGS]{"a": ', said("Hi.", [("f", '{"a":')])),
        ("mistral", "[TOOL_CALLS]f[ARGS][TOOL_CALLS]g[ARGS]{}", said(None, [("f", "{}"), ("g", "{}")])),
        ("mistral", "a [ARGS] b", ParsedMessage("a [ARGS] b")),
        ("deepseek_v3", f"{DEEPSEEK[0]}{CALL}function{SEP}g\n", said(None, [("g", "")])),
        ("deepseek_v3", f"{CALL}function{CALL_END}", ParsedMessage(f"{CALL}function{CALL_END}")),
        ("deepseek_v31", f"{CALL}f{SEP}{{}}{CALL_END}End.", said("End.", [("f", "{}")])),
        ("qwen3_coder", "<tool_call>x", ParsedMessage("<tool_call>x")),
        ("qwen3_coder", "<tool_call>\n<function=g>\n</function>\n</tool_call>", said(None, [("g", "{}")])),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=number>\n5\n</parameter>\n<parameter=text>\nab",
            said(None, [("f", '{"number": 5')]),
        ),
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter=number>many</parameter><parameter=other>7</parameter></function></tool_call>",
            said(None, [("f", '{"number": "many", "other": "7"}')]),
        ),
        (
            "pythonic",
            "[f(a=1, b='x', c=[true, None], d={'k': -1.5})]",
            said(None, [("f", '{"a": 1, "b": "x", "c": [true, null], "d": {"k": -1.5}}')]),
        ),
        ("pythonic", "[a.b(), g()] then", said(" then", [("a.b", "{}"), ("g", "{}")])),
        ("pythonic", "[f(1)]", ParsedMessage("[f(1)]")),
        ("pythonic", "[f(a=__import__('os'))]", ParsedMessage("[f(a=__import__('os'))]")),
        ("pythonic", "[f(a=1e999)]", ParsedMessage("[f(a=1e999)]")),
        ("pythonic", "[1, 2] is a list", ParsedMessage("[1, 2] is a list")),
    ],
)  # fmt: skip
def test_examples(kind: str, text: str, expected: ParsedMessage) -> None:
    assert parsed(kind, text) == expected
    assert parsed(kind, *text) == expected


@pytest.mark.parametrize(
    ("template", "kind"),
    [*((template, kind) for kind, template in OWN), ("glm-4.6", None), ("phi-4", None), ("gemma", None)],
)
def test_auto_finds_the_format_of_a_template(template: str, kind: str | None) -> None:
    source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    assert tool_format_of(source) == kind
    config = server_config({"enable_auto_tool_choice": True, "tool_call_parser": "auto"})
    if kind is None:
        with pytest.raises(ConfigError, match="auto finds none"):
            with_model_defaults(config, Path("nowhere"), source)
    else:
        assert with_model_defaults(config, Path("nowhere"), source).tool_call_parser == kind
