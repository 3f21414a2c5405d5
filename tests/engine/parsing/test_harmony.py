"""Harmony: the messages of an output, however it is cut; broken ones; what a prompt leaves unfinished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import harmony_backend

from sempre.engine.parsing import OutputParser, ParsedMessage, ToolCall, assemble
from sempre.engine.parsing.harmony import TAGS, HarmonyParser, is_harmony, open_message
from sempre.engine.parsing.tool_calls import NamedCallParser
from sempre.engine.text.chat_template import render_chat
from sempre.engine.text.tokenizer import Tokenizer

PROMPT = "<|start|>assistant"
TEMPLATE = (Path(__file__).parents[1] / "chat_templates" / "gpt-oss.jinja").read_text()


def parsed(*chunks: str, prompt: str = PROMPT, calls: bool = True, one_call: bool = False) -> ParsedMessage:
    parser = OutputParser(HarmonyParser(prompt, calls=calls), None, one_call=one_call)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return assemble([*pieces, *parser.finish()])


ANALYSIS = "<|channel|>analysis<|message|>Let me see.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>"
WEATHER = '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
CLOCK = "<|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{}<|call|>"
CALLS = [ToolCall("weather", '{"city": "Rome"}'), ToolCall("clock", "{}")]

CASES = {
    "reasoning and answer": (ANALYSIS + FINAL, ParsedMessage("It rains.", "Let me see.")),
    "answer alone": ("<|channel|>final<|message|>Hi.<|return|>", ParsedMessage("Hi.")),
    "the end of sequence is not in the text": ("<|channel|>final<|message|>Hi.", ParsedMessage("Hi.")),
    "cut in the reasoning": ("<|channel|>analysis<|message|>Let", ParsedMessage(reasoning="Let")),
    "cut in a header": (ANALYSIS + "<|start|>assistant<|channel|>fin", ParsedMessage(reasoning="Let me see.")),
    "cut in a recipient": (ANALYSIS + "<|start|>assistant to=func", ParsedMessage(reasoning="Let me see.")),
    "calls": (ANALYSIS + WEATHER + "<|call|>" + CLOCK, ParsedMessage(None, "Let me see.", CALLS)),
    "a call at once": (
        " to=functions.clock<|channel|>commentary <|constrain|>json<|message|>{}",
        ParsedMessage(tool_calls=[ToolCall("clock", "{}")]),
    ),
    "a call on another channel": (
        "<|channel|>analysis to=functions.clock <|constrain|>json<|message|>{}<|call|>",
        ParsedMessage(tool_calls=[ToolCall("clock", "{}")]),
    ),
    "a call without arguments": (
        "<|channel|>commentary to=functions.clock<|message|><|call|>",
        ParsedMessage(tool_calls=[ToolCall("clock", "{}")]),
    ),
    "a call that is cut off": (
        "<|channel|>commentary to=functions.clock json<|message|>" + '{"a": [1',
        ParsedMessage(tool_calls=[ToolCall("clock", '{"a": [1')]),
    ),
    "a preamble is content": (
        "<|channel|>commentary<|message|>I look.<|end|>" + WEATHER,
        ParsedMessage("I look.", None, CALLS[:1]),
    ),
    "for a tool of its own": (
        "<|channel|>analysis to=python code<|message|>1 + 1<|call|>" + FINAL,
        ParsedMessage("It rains.", "1 + 1"),
    ),
    "no function's name": (
        "<|channel|>commentary to=functions. json<|message|>{}<|call|>",
        ParsedMessage(reasoning="{}"),
    ),
    "messages of one kind": (
        ANALYSIS + PROMPT + ANALYSIS + FINAL + FINAL,
        ParsedMessage("It rains.\nIt rains.", "Let me see.\nLet me see."),
    ),
    "no end tag": ("<|channel|>analysis<|message|>Hm." + FINAL, ParsedMessage("It rains.", "Hm.")),
    "neither end nor start": (
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Hi.",
        ParsedMessage("Hi.", "Hm."),
    ),
    "tags inside a message": (
        "<|channel|>final<|message|>a<|message|>b<|constrain|>c<|end|>",
        ParsedMessage("abc"),
    ),
    "no harmony": ("It rains, I < think |>.", ParsedMessage("It rains, I < think |>.")),
    "text after a message": (FINAL + "And then?", ParsedMessage("It rains.\nAnd then?")),
    "blanks between messages": (ANALYSIS + " \n" + FINAL + "\n", ParsedMessage("It rains.", "Let me see.")),
    "a role alone": ("<|channel|>final<|message|>Hi.<|end|><|start|>assistant", ParsedMessage("Hi.")),
    "text after a role": ("<|start|>assistantHi.<|end|>", ParsedMessage("Hi.")),
    "ends only": ("<|end|><|return|><|call|>", ParsedMessage()),
    "nothing": ("", ParsedMessage()),
}


@pytest.mark.parametrize("name", CASES)
def test_messages(name: str) -> None:
    text, expected = CASES[name]
    assert parsed(text) == expected
    assert parsed(*text) == expected


def test_calls_that_nobody_asked_for_are_content() -> None:
    assert parsed(ANALYSIS + WEATHER, calls=False) == ParsedMessage('{"city": "Rome"}', "Let me see.")


def test_one_call() -> None:
    assert parsed(WEATHER + CLOCK, one_call=True).tool_calls == CALLS[:1]


def test_an_enforced_call_is_the_final_message() -> None:
    parser = OutputParser(HarmonyParser(PROMPT, calls=False), NamedCallParser("f"))
    message = assemble(parser.parse(ANALYSIS + '<|start|>assistant<|channel|>final<|message|> {"a": 1}'))
    assert message == ParsedMessage(None, "Let me see.", [ToolCall("f", '{"a": 1}')])


FRAGMENTS = st.sampled_from(
    [*TAGS, "assistant", "analysis", "final", "commentary ", " to=functions.f", "to=python", " json", "{}", "<|",
     "<|en", "|>", "d|>", " ", "\n", "é", "Hello", ANALYSIS, FINAL, WEATHER, CLOCK]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@given(data=st.data(), prompt=st.sampled_from(["", PROMPT, PROMPT + "<|channel|>final<|message|>I "]))
@settings(max_examples=160)
def test_chunks_do_not_affect_the_result(data: st.DataObject, prompt: str) -> None:
    text = data.draw(TEXTS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(*chunks, prompt=prompt) == parsed(text, prompt=prompt) == parsed(*text, prompt=prompt)


@given(text=TEXTS)
@settings(max_examples=100)
def test_pieces_come_in_order(text: str) -> None:
    """A call begins before its arguments come, calls are numbered from 0, no piece is empty."""
    parser = HarmonyParser(PROMPT, calls=True)
    begun = 0
    for piece in [*(p for character in text for p in parser.feed(character)), *parser.finish()]:
        index = getattr(piece, "index", None)
        if type(piece).__name__ == "CallStart":
            assert index == begun
            begun += 1
        else:
            assert index is None or index == begun - 1
        assert getattr(piece, "text", "x")


def test_what_a_prompt_leaves_unfinished() -> None:
    tokenizer = Tokenizer(harmony_backend())
    assert is_harmony(tokenizer)
    for text, expected in (
        ("<|start|>user<|message|>Hi.<|end|><|start|>assistant", PROMPT),
        (
            "<|start|>assistant<|channel|>final<|message|>I am",
            "<|start|>assistant<|channel|>final<|message|>I am",
        ),
        ("<|start|>user<|message|>Hi.<|end|>", ""),
        ("Hi.", ""),
        ("", ""),
    ):
        assert open_message(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == expected
    continued = parsed("n old.<|return|>", prompt="<|start|>assistant<|channel|>final<|message|>I am a")
    assert continued == ParsedMessage("n old.")
    # what looks like the beginning of a tag in a prompt is text
    assert parsed("b", prompt="<|start|>assistant<|channel|>final<|message|>a <|") == ParsedMessage("b")


def test_the_template_and_the_parser_agree() -> None:
    """What the template makes of a message is read as that message, and nothing is left for it to say."""
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turn = {"role": "assistant", "content": None, "reasoning": "Let me see.", "tool_calls": [call]}
    asked = [{"role": "user", "content": "Does it rain?"}]
    before, after = (
        render_chat(
            messages, TEMPLATE, date_string="2025-06-28", add_generation_prompt=len(messages) == 1,
            reasoning_effort="high",
        )
        for messages in (asked, [*asked, turn])
    )  # fmt: skip
    assert "Reasoning: high" in before
    assert after.startswith(before.removesuffix(PROMPT))
    message = parsed(after[len(before.removesuffix(PROMPT)) :], prompt="")
    assert (message.reasoning, message.content) == ("Let me see.", None)
    assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == [("weather", {"city": "Rome"})]
