"""Outputs and tools that no parser expects: whatever a model writes, its request has an answer, and soon."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import pytest

from sempre.engine.parsing import TOOL_PARSERS
from sempre.engine.parsing.gemma4 import Gemma4Parser
from sempre.engine.parsing.output_parser import Schemas
from sempre.engine.parsing.pieces import ParsedMessage, Parser, assemble

_SIZES = (1, 7, 10**9)


def parsed(name: str, text: str, schemas: Schemas | None = None, sizes: Sequence[int] = _SIZES) -> ParsedMessage:
    """The message of a text, however it is cut, which must be one that UTF-8 and JSON can hold."""
    found = []
    for size in sizes:
        parser: Parser = Gemma4Parser("", calls=True) if name == "gemma4" else TOOL_PARSERS[name](schemas or {})
        pieces = [piece for at in range(0, len(text), size) for piece in parser.feed(text[at : at + size])]
        found.append(assemble([*pieces, *parser.finish()]))
        msgspec.json.encode(found[-1])
    assert all(message == found[0] for message in found)
    return found[0]


@pytest.mark.parametrize(("escaped", "meant"), [(r"\ud83d\ude00", "😀"), (r"\ud800", "�"), (r"\ude00x", "�x")])
@pytest.mark.parametrize(
    ("name", "text", "function", "arguments"),
    [
        ("pythonic", '[f(a="%s")]', "f", '{"a": "%s"}'),
        ("pythonic", '[f(a={"%s": 1})]', "f", '{"a": {"%s": 1}}'),
        ("hermes", '<tool_call>{"name": "f%s", "arguments": {}}</tool_call>', "f%s", "{}"),
        ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": \"%s\"}"}</tool_call>', "f", '{"a": "%s"}'),
        ("llama3_json", '{"name": "f%s", "parameters": {}}', "f%s", "{}"),
        ("mistral", '[TOOL_CALLS][{"name": "f%s", "arguments": {}}]', "f%s", "{}"),
        ("gemma4", '<|tool_call>call:f{a:"%s"}<tool_call|>', "f", '{"a": "%s"}'),
        ("gemma4", '<|tool_call>call:f{"%s":1}<tool_call|>', "f", '{"%s": 1}'),
    ],
)
def test_escapes_make_no_text_that_cannot_be_sent(
    name: str, text: str, function: str, arguments: str, escaped: str, meant: str
) -> None:
    [call] = parsed(name, text.replace("%s", escaped)).tool_calls
    assert (call.name, call.arguments) == (function.replace("%s", meant), arguments.replace("%s", meant))


@pytest.mark.parametrize("value", ["[" * 20_000, '{"a":' * 20_000, "[" * 20_000 + "]" * 20_000])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>%s</tool_call>"),
        ("llama3_json", "%s"),
        ("mistral", "[TOOL_CALLS][%s]"),
        ("pythonic", "[f(a=%s)]"),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>%s</parameter></function></tool_call>"),
        ("gemma4", "<|tool_call>call:f{a:%s}<tool_call|>"),
    ],
)
def test_nesting_without_end_is_read(name: str, text: str, value: str) -> None:
    for call in ('{"name": %s}', '{"name": "f", "arguments": "%s"}', "%s"):
        message = parsed(name, text % (call % value), sizes=(1000, 10**9))
        assert message.content or message.tool_calls


_PARTS = ["<parameter=", "<parameter=a", "</", "<", "a", "<parameter=<", "</func", "<parameter>"]


@pytest.mark.parametrize("part", _PARTS)
def test_what_is_between_parameters_is_not_kept(part: str) -> None:
    """Else each part of an output would be looked at again with every later one."""
    parser = TOOL_PARSERS["qwen3_coder"]({})
    parser.feed("<tool_call><function=f>")
    for _ in range(2000):
        parser.feed(part)
        assert len(vars(parser)["_text"]) <= 600
    ends = "<parameter=b>1</parameter></function></tool_call>"
    message = parsed("qwen3_coder", "<tool_call><function=f>" + part * 2000 + ends)
    assert [call.arguments for call in message.tool_calls] == ['{"b": "1"}']


_A_CALL = "<tool_call><function=f><parameter=a>5</parameter></function></tool_call>"


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"properties": None}, '{"a": "5"}'),
        ({"properties": []}, '{"a": "5"}'),
        ({"properties": {"a": 5}}, '{"a": "5"}'),
        ({"properties": {"a": True}}, '{"a": "5"}'),
        ({"properties": {"a": {"type": [["x"], "integer"]}}}, '{"a": 5}'),
        ({"properties": {"a": {"type": {"x": 1}}}}, '{"a": "5"}'),
        ({"properties": {"a": {"enum": 5}}}, '{"a": "5"}'),
        ({"properties": {"a": {"anyOf": 5, "oneOf": {"type": "integer"}}}}, '{"a": "5"}'),
        ({"properties": {"a": {"anyOf": [5, {"type": "integer"}]}}}, '{"a": 5}'),
    ],
)
def test_a_schema_that_is_none_says_nothing(parameters: dict[str, object], arguments: str) -> None:
    [call] = parsed("qwen3_coder", _A_CALL, {"f": parameters}).tool_calls
    assert call.arguments == arguments


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a":', "1}"),
        ("mistral", "[TOOL_CALLS]f[ARGS]{", "``x}"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{", "}<｜tool▁call▁end｜>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{", "}\n```<｜tool▁call▁end｜>"),
        ("qwen3_coder", "<tool_call><function=f><parameter=", ""),
        ("qwen3_coder", "<tool_call><function=", ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": {', "}}</tool_call>"),
        ("llama3_json", '{"name": "f", "parameters": {', "}}"),
        ("pythonic", "[f(a=", "1)]"),
        ("gemma4", "<|tool_call>call:f{a:", "1}<tool_call|>"),
    ],
)
@pytest.mark.parametrize("space", [" ", "\n", " `"])
def test_white_space_takes_no_more_time_than_other_text(name: str, begin: str, end: str, space: str) -> None:
    """Time that grew with the square of its length, or the cube, would not end here."""
    message = parsed(name, begin + space * 100_000 + end, sizes=(10**9,))
    assert message.content or message.tool_calls


_LONG_CALLS = {
    "pythonic: integers": ("pythonic", "[f(a=[" + "1," * 64_000 + "])]"),
    "pythonic: calls": ("pythonic", "[" + "f(), " * 26_000 + "f()]"),
    "pythonic: escapes": ("pythonic", '[f(a="' + r"\n" * 64_000 + '")]'),
    "pythonic: strings": ("pythonic", "[f(a=" + '"a" ' * 32_000 + ")]"),
    "hermes": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [' + "1," * 64_000 + "1]}}</tool_call>"),
    "llama3_json": ("llama3_json", '{"name": "f", "parameters": {}};' * 4_000),
    "mistral": ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "' + r"\n" * 64_000 + '"}]'),
    "deepseek_v3": ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n" + " `" * 64_000),
    "deepseek_v31": ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>" * 2_500),
    "qwen3_coder: values": ("qwen3_coder", "<tool_call><function=f>" + "<parameter=a>5</parameter>" * 5_000),
    "qwen3_coder: text": ("qwen3_coder", "<tool_call><function=f>" + "<parameter=a" * 10_000),
    "gemma4": ("gemma4", "<|tool_call>call:f{a:[" + "1," * 64_000 + "]}<tool_call|>"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name == "pythonic: integers" else pytest.mark.product) for name in _LONG_CALLS],
)
def test_no_part_of_a_long_call_takes_long(case: str) -> None:
    """Of 128 KB, in the parts that a stream has, and in the largest that an event loop parses."""
    name, text = _LONG_CALLS[case]
    for size in (16, 8000):
        parser: Parser = Gemma4Parser("", calls=True) if name == "gemma4" else TOOL_PARSERS[name]({"f": None})
        slowest = 0.0
        for start in range(0, len(text), size):
            begun = time.thread_time()
            parser.feed(text[start : start + size])
            slowest = max(slowest, time.thread_time() - begun)
        begun = time.thread_time()
        parser.finish()
        assert max(slowest, time.thread_time() - begun) < 0.1


@pytest.mark.parametrize("tail", ["", "`", "``", "```", "````", "``` ", "\n```\n", " \n `", "` ``", "```\n x"])
def test_arguments_end_before_the_fence_that_may_be_around_them(tail: str) -> None:
    text = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}' + tail + "<｜tool▁call▁end｜>"
    [call] = parsed("deepseek_v3", text).tool_calls
    expected = {"````": '{"a": 1}`', "` ``": '{"a": 1}`', "```\n x": '{"a": 1}```\n x'}
    assert call.arguments == expected.get(tail, '{"a": 1}')
