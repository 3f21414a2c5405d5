"""Prompts equal those of transformers, and depend on nothing but the arguments."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from sempre.engine.text.chat_template import RESERVED_VARIABLES, checked_variables, load_chat_template, render_chat
from sempre.ipc.errors import ConfigError, ModelError, RequestError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + eos_token }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GENERATION_TAG = (
    "{% for message in messages %}{% if message.role == 'user' %}U:{{ message.content }}\n{% continue %}{% endif %}"
    "{% generation %}A:{{ message.content }}{% endgeneration %}\n{% endfor %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": " Be <brief> & 'kind'. "},
        {"role": "user", "content": "naïve café 日本"},
        {"role": "assistant", "content": " Yes, and"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "a <b> & 'c' é", "parameters": {}}}]


def by_transformers(messages: list[dict[str, Any]], template: str, **kwargs: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.BPE(vocab={"a": 0}, merges=[])), bos_token="<bos>", eos_token="<eos>"
    )
    prompt = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
    assert isinstance(prompt, str)
    return prompt


def ours(messages: list[dict[str, Any]], template: str, **kwargs: Any) -> str:
    return render_chat(messages, template, bos_token="<bos>", eos_token="<eos>", **kwargs)


@pytest.mark.parametrize("template", [CHATML, HEADERS, GENERATION_TAG], ids=["chatml", "headers", "generation"])
@pytest.mark.parametrize("messages", CHATS, ids=["question", "dialogue"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_prompts_equal_those_of_transformers(
    template: str, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: list[dict[str, Any]] | None
) -> None:
    arguments: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
        "date_string": "01 Feb 2025",
    }
    assert ours(messages, template, **arguments) == by_transformers(messages, template, **arguments)


@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["chatml", "headers"])
def test_continuing_the_final_message_equals_transformers(template: str) -> None:
    arguments = {"add_generation_prompt": False, "continue_final_message": True, "date_string": "01 Feb 2025"}
    prompt = ours(CHATS[1], template, **arguments)
    assert prompt == by_transformers(CHATS[1], template, **arguments)
    assert prompt.endswith("Yes, and")
    assert CHATS[1][-1]["content"] == " Yes, and"  # the caller's messages stay as they were


def test_text_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ours([{"role": "user", "content": parts}], CHATML) == ours([{"role": "user", "content": "one\ntwo"}], CHATML)


def test_a_tool_call_may_have_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}"
    assert ours([message], template) == '[{"function": {"name": "f", "arguments": {}}, "type": "function"}]'


def test_the_date_is_never_todays() -> None:
    assert "Today Date: 26 Jul 2024" in ours(CHATS[0], HEADERS)
    assert "Today Date: 1 May" in ours(CHATS[0], HEADERS, date_string="1 May")
    asks = "{{ strftime_now('%Y') }}"
    assert ours(CHATS[0], asks, date_string="1999") == "1999"
    with pytest.raises(RequestError, match=r"today's date .*date_string=") as refusal:
        ours(CHATS[0], asks)
    assert refusal.value.parameter == "chat_template"


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_templates_cannot_draw_random_numbers(template: str) -> None:
    before = random.getstate()
    with pytest.raises(RequestError):
        ours(CHATS[0], template)
    assert random.getstate() == before


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/hostname' %}"]
)
def test_templates_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError):
        ours(CHATS[0], template)


@pytest.mark.parametrize(
    ("messages", "parameter"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "", "content": "hi"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_messages_that_do_not_fit_are_named(messages: list[Any], parameter: str) -> None:
    with pytest.raises(RequestError) as refusal:
        ours(messages, CHATML)
    assert refusal.value.parameter == parameter


def test_what_the_template_objects_to_is_passed_on() -> None:
    with pytest.raises(RequestError, match="unknown role critic"):
        ours([{"role": "critic", "content": "x"}], HEADERS)
    with pytest.raises(RequestError, match="not valid Jinja: line 2"):
        ours(CHATS[0], "\n{% if %}")


def test_continuation_needs_something_to_continue() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        ours(CHATS[1], CHATML, continue_final_message=True)
    arguments = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match=r"messages\[0\]\.content is empty"):
        ours([{"role": "assistant", "content": ""}], CHATML, **arguments)
    with pytest.raises(RequestError, match="does not put the last message into the prompt"):
        ours(CHATS[1], "{{ messages[0].content }}", **arguments)


def test_where_templates_come_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template") as refusal:
        load_chat_template(tmp_path)
    assert refusal.value.parameter == "chat_template"
    assert str(tmp_path) in str(refusal.value)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_chat_template(tmp_path) == "one"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path) == "plain"
    assert load_chat_template(tmp_path, tools=TOOLS) == "with tools"
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ModelError, match="chat_template must be a string, found int"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file with tools")
    assert load_chat_template(tmp_path, tools=TOOLS) == "file with tools"
    assert load_chat_template(tmp_path) == "file"


WALKS = (
    "{% for m in messages %}{% if m.content is string %}[{{ m.content }}]{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)


def test_the_content_format_can_be_fixed() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert ours(messages, WALKS) == "[s]<a><b>"
    assert ours(messages, WALKS, content_format="string") == "[s][a\nb]"
    assert ours(messages, WALKS, content_format="openai") == "<s><a><b>"


def test_parts_are_continued_in_the_last_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    arguments = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [*CHATS[0], {"role": "assistant", "content": parts}]
    assert ours(messages, WALKS, **arguments) == f"[{CHATS[0][0]['content']}]<a><b"


def test_a_newer_name_of_the_system_and_refusals_are_understood() -> None:
    refusal = [{"type": "refusal", "refusal": "No."}]
    messages = [{"role": "developer", "content": "x"}, {"role": "assistant", "content": refusal}]
    assert ours(messages, "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}") == (
        "system:x;assistant:No.;"
    )


def test_a_reply_of_nothing_is_empty_not_none() -> None:
    messages = [*CHATS[0], {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": None}]
    assert ours(messages, CHATML).endswith("<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n")


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (CALL, "messages[0].tool_calls[0].function.arguments"),
        ({"function": {"arguments": "{}"}}, "messages[0].tool_calls[0].function.name"),
        ({"function": "f"}, "messages[0].tool_calls[0]"),
        (3, "messages[0].tool_calls[0]"),
    ],
)
def test_calls_that_do_not_fit_are_named(call: object, parameter: str) -> None:
    template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
    with pytest.raises(RequestError) as refusal:
        ours([{"role": "assistant", "tool_calls": [call]}], template)
    assert refusal.value.parameter == parameter


def test_a_template_that_wants_text_gets_a_call_that_was_cut_off_unchanged() -> None:
    template = "{% for m in messages if m.tool_calls %}{{ '>' + m.tool_calls[0].function.arguments }}{% endfor %}"
    assert ours([{"role": "assistant", "tool_calls": [CALL]}], template) == '>{"a": '


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES))
def test_what_the_engine_gives_a_template_cannot_be_replaced(name: str) -> None:
    with pytest.raises(RequestError, match="chat_template_kwargs must not hold") as refusal:
        checked_variables({"fine": 1, name: 1})
    assert refusal.value.parameter == "chat_template_kwargs"
    assert checked_variables(None) == {}
