"""Reasoning in each model's own form: found as a regular expression finds it, however the text is cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level_backend
from tokenizers import AddedToken

from sempre.engine.parsing import OutputParser, ParsedMessage, assemble
from sempre.engine.parsing.output_parser import REASONING_PARSERS, TOOL_PARSERS, reasoning_splitter
from sempre.engine.parsing.reasoning import opens_reasoning, tags_of
from sempre.engine.server.body import parse_model
from sempre.engine.server.config import server_config
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.tools import ChatPlan
from sempre.engine.text.chat_template import render_chat
from sempre.engine.text.tokenizer import Tokenizer

# regular expressions of what begins and what ends reasoning
FORMS = {
    "qwen3": ("<think>", "</think>"),
    "deepseek_r1": ("<think>", "</think>"),
    "mistral": (r"\[THINK\]", r"\[/THINK\]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
    "granite": ("Here(?: is|'s) my thought process:", "Here(?: is|'s) my response:"),
}
FRAGMENTS = {
    "qwen3": ["<think>", "</think>", "</thi"],
    "deepseek_r1": ["<think>", "</think>", "</thi"],
    "mistral": ["[THINK]", "[/THINK]", "[/TH"],
    "seed_oss": ["<seed:think>", "</seed:think>", "</seed"],
    "granite": [
        "Here is my thought process:", "Here's my thought process:", "Here is my response:", "Here's my response:",
        "Here", " is my ", "Here's my ",
    ],
}  # fmt: skip


def parsed(name: str, *chunks: str, opened: bool = False) -> ParsedMessage:
    made = OutputParser(reasoning_splitter(name, opened), None)
    pieces = [piece for chunk in chunks for piece in made.feed(chunk)]
    return assemble([*pieces, *made.finish()])


def test_every_form_is_tried() -> None:
    assert set(FORMS) == set(REASONING_PARSERS) == set(FRAGMENTS)


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
@settings(max_examples=60)
def test_reasoning_is_what_a_regular_expression_finds(name: str, data: st.DataObject) -> None:
    text = data.draw(st.lists(st.sampled_from([*FRAGMENTS[name], "\n", " ", "Hm.", "<", "["]), max_size=8).map("".join))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    opened = data.draw(st.booleans())
    start, end = FORMS[name]
    begin = re.fullmatch(rf"\s*(?:{start})(.*)", text, re.DOTALL)
    inside = opened or name == "deepseek_r1"
    expected = ParsedMessage(text or None)
    if begin or inside:
        parts = re.split(end, begin[1] if begin else text, maxsplit=1)
        expected = ParsedMessage((parts[1] if len(parts) > 1 else "") or None, parts[0] or None)
    assert parsed(name, text, opened=opened) == expected
    assert parsed(name, *chunks, opened=opened) == expected
    assert parsed(name, *text, opened=opened) == expected


def test_calls_follow_reasoning() -> None:
    text = "[THINK]Where?[/THINK]I look.[TOOL_CALLS]f[ARGS]{}"
    for chunks in ([text], list(text)):
        made = OutputParser(reasoning_splitter("mistral", False), TOOL_PARSERS["mistral"]({}))
        message = assemble([*(p for chunk in chunks for p in made.feed(chunk)), *made.finish()])
        assert (message.reasoning, message.content) == ("Where?", "I look.")
        assert [(call.name, call.arguments) for call in message.tool_calls] == [("f", "{}")]


@pytest.mark.parametrize("tags", [("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("<think>", "</think>")])
def test_tags_are_those_of_the_tokenizer(tags: tuple[str, str]) -> None:
    backend = byte_level_backend()
    backend.add_special_tokens([AddedToken("[/INST]", special=True)])
    backend.add_special_tokens([AddedToken(tag, special=tag.startswith("[")) for tag in tags])
    tokenizer = Tokenizer(backend)
    assert tuple(tags_of(tokenizer)) == tags
    start, end = tags
    for prompt, opened in [
        (f"Hi[/INST]{start}", True),
        (f"{start}a{end}Hi[/INST]", False),
        (f"Hi[/INST]{start}a{end}", None),
    ]:
        assert opens_reasoning(tokenizer, tokenizer.encode(prompt, add_special_tokens=False)) is opened, prompt


def plan(name: str, **fields: Any) -> ChatPlan:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    return ChatPlan.of(parse_model(body, ChatCompletionRequest), server_config({"reasoning_parser": name}))


def test_special_tokens_are_read_where_they_are_tags() -> None:
    assert plan("mistral").reads_special_tokens
    assert not plan("seed_oss").reads_special_tokens


def test_phrases_are_unknown_to_grammars_and_budgets() -> None:
    """A form is then all of the answer, and a budget is refused rather than ignored."""
    form = {"response_format": {"type": "json_object"}}
    forms = {name: plan(name, **form).form for name in ("granite", "mistral")}
    assert forms["granite"] is not None
    assert forms["mistral"] is not None
    assert (forms["granite"].after_reasoning, forms["mistral"].after_reasoning) == (False, True)
    with pytest.raises(BadRequest, match="thinking_token_budget is not available"):
        plan("granite", thinking_token_budget=5)
    assert plan("granite", thinking_token_budget=-1).form is None


@pytest.mark.parametrize(("name", "template"), [("qwen3", "qwen3"), ("qwen3", "glm-4.6"), ("seed_oss", "seed-oss")])
def test_what_a_models_own_template_writes_is_read(name: str, template: str) -> None:
    source = (Path(__file__).parents[1] / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    variables = {"bos_token": "", "eos_token": "<eos>"}
    user = {"role": "user", "content": "What?"}
    prompt = render_chat([user], source, **variables)
    answer = {"role": "assistant", "content": "Rain.", "reasoning_content": "Is it dry?"}
    whole = render_chat([user, answer], source, add_generation_prompt=False, **variables)
    assert whole.startswith(prompt)
    text = whole.removeprefix(prompt).partition("<seed:eos>")[0].partition("<|im_end|>")[0]
    for chunks in ([text], list(text)):
        found = parsed(name, *chunks)
        assert found.reasoning is not None
        assert found.content is not None
        assert (found.reasoning.strip(), found.content.strip()) == ("Is it dry?", "Rain.")
