"""Gemma 4: thoughts, calls and answers, however they are cut; broken ones; arguments as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import gemma4_backend

from sempre.engine.parsing import OutputParser, ParsedMessage, ToolCall, assemble
from sempre.engine.parsing.gemma4 import TAGS, Gemma4Parser, is_gemma4, open_channel
from sempre.engine.parsing.reasoning import opens_reasoning
from sempre.engine.parsing.tool_calls import NamedCallParser
from sempre.engine.text.chat_template import render_chat
from sempre.engine.text.tokenizer import Tokenizer

TEMPLATE = (Path(__file__).parents[1] / "chat_templates" / "gemma-4.jinja").read_text(encoding="utf-8")


def parsed(*chunks: str, prompt: str = "", calls: bool = True, one_call: bool = False) -> ParsedMessage:
    parser = OutputParser(Gemma4Parser(prompt, calls=calls), None, one_call=one_call)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return assemble([*pieces, *parser.finish()])


def calling(arguments: str, end: str = "<tool_call|>") -> str:
    return f"<|tool_call>call:f{arguments}{end}"


THOUGHT = "<|channel>thought\nLet me see.<channel|>"
WEATHER = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
CLOCK = "<|tool_call>call:clock{}<tool_call|>"
CALLS = [ToolCall("weather", '{"city": "Rome", "days": 2}'), ToolCall("clock", "{}")]

CASES = {
    "thought and answer": (THOUGHT + "It rains.", ParsedMessage("It rains.", "Let me see.")),
    "answer alone": ("It rains.", ParsedMessage("It rains.")),
    "no thought": ("<|channel>thought\n<channel|>It rains.", ParsedMessage("It rains.")),
    "cut in the thought": ("<|channel>thought\nLet", ParsedMessage(reasoning="Let")),
    "cut in the channel's name": ("<|channel>thou", ParsedMessage(reasoning="thou")),
    "cut after the channel's name": ("<|channel>thought", ParsedMessage()),
    "another channel": ("<|channel>thoughts: a\nb<channel|>c", ParsedMessage("c", "thoughts: a\nb")),
    "two thoughts": (THOUGHT + "Hm. " + THOUGHT + "Yes.", ParsedMessage("Hm. Yes.", "Let me see.\nLet me see.")),
    "an empty thought and a thought": ("<|channel>thought\n<channel|>" + THOUGHT, ParsedMessage(None, "Let me see.")),
    "calls": (THOUGHT + WEATHER + CLOCK, ParsedMessage(None, "Let me see.", CALLS)),
    "content before a call": ("I look. \n" + WEATHER, ParsedMessage("I look. \n", None, CALLS[:1])),
    "blanks between calls": (WEATHER + "\n" + CLOCK + " ", ParsedMessage(None, None, CALLS)),
    "the response is the caller's": (WEATHER + "<|tool_response>", ParsedMessage(None, None, CALLS[:1])),
    "content after a call": (CLOCK + "Then.", ParsedMessage("Then.", None, CALLS[1:])),
    "text after the arguments": (calling("{} so<tool_call|>"[:-12]), ParsedMessage(" so", None, [ToolCall("f", "{}")])),
    "no end tag": (WEATHER.removesuffix("<tool_call|>") + CLOCK, ParsedMessage(None, None, CALLS)),
    "a thought ends a call": ("<|tool_call>call:f{a:1" + THOUGHT, ParsedMessage(None, "Let me see.", [
        ToolCall("f", '{"a": 1}')])),
    "only a name": ("<|tool_call>call:clock<tool_call|>", ParsedMessage(None, None, CALLS[1:])),
    "no name": ("<|tool_call>call:{}<tool_call|>", ParsedMessage("<|tool_call>call:{}")),
    "a name of two words": ("<|tool_call>call:a b{}<tool_call|>", ParsedMessage("<|tool_call>call:a b{}")),
    "no call": ("<|tool_call>hm<tool_call|>", ParsedMessage("<|tool_call>hm<tool_call|>")),
    "quoted before the name": ('<|tool_call>call:<|"|>f<|"|>{}', ParsedMessage('<|tool_call>call:<|"|>f<|"|>{}')),
    "cut in a name": ("<|tool_call>call:wea", ParsedMessage("<|tool_call>call:wea")),
    "cut in a text": ('<|tool_call>call:f{a:<|"|>Ro', ParsedMessage(None, None, [ToolCall("f", '{"a": "Ro')])),
    "cut in a number": ("<|tool_call>call:f{a:12", ParsedMessage(None, None, [ToolCall("f", '{"a": 12')])),
    "cut in a word": ("<|tool_call>call:f{a:tr", ParsedMessage(None, None, [ToolCall("f", '{"a": ')])),
    "ends only": ("<channel|><turn|><tool_call|>", ParsedMessage()),
    "what looks like a tag": ("a <|tool <call|> b", ParsedMessage("a <|tool <call|> b")),
    "tags in a text": ('<|tool_call>call:f{a:<|"|><turn|> <|channel><|"|>}', ParsedMessage(None, None, [
        ToolCall("f", '{"a": "<turn|> <|channel>"}')])),
    "nothing": ("", ParsedMessage()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_messages(name: str) -> None:
    text, expected = CASES[name]
    assert parsed(text) == expected
    assert parsed(*text) == expected


ARGUMENTS: dict[str, object] = {
    '{a:<|"|>b, {c}: [d]\n"é"\\<|"|>}': {"a": 'b, {c}: [d]\n"é"\\'},
    "{a:1,b:-2.5e3,c:true,d:false,e:null,f:None,g:True}":
        {"a": 1, "b": -2500.0, "c": True, "d": False, "e": None, "f": None, "g": True},
    '{a:[],b:{},c:[[1],{d:[<|"|>x<|"|>,2]}]}': {"a": [], "b": {}, "c": [[1], {"d": ["x", 2]}]},
    "{ a : 1 , b : [ 1 , 2 ] }": {"a": 1, "b": [1, 2]},
    '{<|"|>a b:c<|"|>:1,"d\\n:,e":2}': {"a b:c": 1, "d\n:,e": 2},
    '{a:"b, \\"c\\"",d:"\\x"}': {"a": 'b, "c"', "d": "\\x"},
    "{a:12:30,b:http://x/y?z,c:01,d:NaN,e:1.}": {"a": "12:30", "b": "http://x/y?z", "c": "01", "d": "NaN", "e": "1."},
    "{a:,b:,c}": {"a": None, "b": None, "c": None},
    '{a:<|"|>b<|"|>c:1,d:[1,,2],}': {"a": "b", "c": 1, "d": [1, 2]},
    "{{a:1}}": {"a": 1},
    "{a:[1}": {"a": [1]},
    '{a:{b:<|"|>c': {"a": {"b": "c"}},
    '{a:"b': {"a": "b"},
    '{<|"|>a': {"a": None},
    '{<|"|>a<|"|>': {"a": None},
    "{a:": {"a": None},
    "{a": {"a": None},
    "{a:x<|\"|>y,b:1}": {"a": 'x"y', "b": 1},
    "{": {},
}  # fmt: skip


@pytest.mark.parametrize("written", ARGUMENTS)
def test_arguments(written: str) -> None:
    [call] = parsed(calling(written)).tool_calls
    assert call.arguments == json.dumps(ARGUMENTS[written], ensure_ascii=False).replace("-2500.0", "-2.5e3")


def test_calls_that_nobody_asked_for_are_content() -> None:
    assert parsed(THOUGHT + WEATHER, calls=False) == ParsedMessage(WEATHER, "Let me see.")


def test_one_call() -> None:
    assert parsed(WEATHER + CLOCK, one_call=True).tool_calls == CALLS[:1]


def test_an_enforced_call_is_the_answer() -> None:
    parser = OutputParser(Gemma4Parser(calls=False), NamedCallParser("f"))
    assert assemble(parser.parse(THOUGHT + ' {"a": 1}')) == ParsedMessage(
        None, "Let me see.", [ToolCall("f", '{"a": 1}')]
    )


FRAGMENTS = st.sampled_from(
    [*TAGS, *TAGS, "thought\n", "thought", "call:f", "call:", "{", "}", "[", "]", ",", ":", '"', "\\", "a", "1", "-",
     "true", "None", " ", "\n", "é", "<|", "|>", "<|tool", THOUGHT, WEATHER, CLOCK, "call:f{a:"]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=16).map("".join)
# a text cannot say what would end it
STRINGS = st.text(st.characters(codec="utf-8")).filter(lambda text: '<|"|>' not in text and "<tool_call|>" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data(), prompt=st.sampled_from(["", "<|channel>thought\n", "<|channel>tho"]), calls=st.booleans())
@settings(max_examples=160)
def test_chunks_do_not_affect_the_result(data: st.DataObject, prompt: str, calls: bool) -> None:
    text = data.draw(TEXTS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parsed(text, prompt=prompt, calls=calls)
    assert parsed(*chunks, prompt=prompt, calls=calls) == parsed(*text, prompt=prompt, calls=calls) == whole


@given(text=TEXTS)
@settings(max_examples=160)
def test_what_has_ended_is_json(text: str) -> None:
    """Whatever is in a call, its arguments are an object once its end tag is there."""
    for call in parsed("<|tool_call>call:f{" + text + "<tool_call|>" + WEATHER).tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@given(text=TEXTS)
@settings(max_examples=100)
def test_pieces_come_in_order(text: str) -> None:
    """A call begins before its arguments come, calls are numbered from 0, no piece is empty."""
    parser = Gemma4Parser(calls=True)
    begun = 0
    for piece in [*(p for character in text for p in parser.feed(character)), *parser.finish()]:
        index = getattr(piece, "index", None)
        if type(piece).__name__ == "CallStart":
            assert index == begun
            begun += 1
        else:
            assert index is None or index == begun - 1
        assert getattr(piece, "text", "x")


def test_depth_and_length_cost_what_they_must() -> None:
    deep = "[" * 100_000
    [call] = parsed(calling("{a:" + deep)).tool_calls
    assert call.arguments == '{"a": ' + deep + "]" * 100_000 + "}"


@given(arguments=st.dictionaries(st.text("abc_", min_size=1), VALUES, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_template_and_the_parser_agree(arguments: dict[str, Any]) -> None:
    """What the template makes of a message is read as that message."""
    text = json.dumps(arguments)
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": text}}
    turn = {"role": "assistant", "content": None, "reasoning": "Let me see.", "tool_calls": [call]}
    asked = [{"role": "user", "content": "Does it rain?"}]
    before, after = (
        render_chat(messages, TEMPLATE, add_generation_prompt=len(messages) == 1, enable_thinking=True)
        for messages in (asked, [*asked, turn])
    )
    assert after.startswith(before)
    message = parsed(after[len(before) :])
    assert (message.reasoning, message.content) == ("Let me see.\n", None)
    [found] = message.tool_calls
    assert (found.name, json.loads(found.arguments)) == ("weather", json.loads(text))


def test_what_a_prompt_leaves_open() -> None:
    tokenizer = Tokenizer(gemma4_backend())
    assert is_gemma4(tokenizer)
    turn = "<|turn>user\nHi.<turn|>\n<|turn>model\n"
    for text, channel, opened in (
        (turn, "", False),
        (turn + "<|channel>thought\n<channel|>", "", None),
        (turn + "<|channel>thought\nHm", "<|channel>thought\nHm", True),
        (turn + CLOCK + "<|tool_response>response:clock{}<tool_response|>", "", False),
        (turn + THOUGHT + "So", "", None),
        ("", "", False),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert open_channel(tokenizer, ids) == channel
        assert opens_reasoning(tokenizer, ids) is opened
    assert parsed("m.<channel|>Yes.", prompt="<|channel>thought\nH") == ParsedMessage("Yes.", "m.")
