"""Prompts of families' templates equal those of transformers, which is given each message in the family's form.

The table says what each template reads, as a person finds it by reading; the engine finds it by itself.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from sempre.engine.text.chat_template import render_chat
from sempre.ipc.errors import RequestError

FOLDER = Path(__file__).parent / "chat_templates"
DATE = "26 Jul 2024"
Message = dict[str, Any]


class Reads(NamedTuple):
    """What a template reads."""

    arguments: str = "object"  # of a tool call; "none": it shows no tool calls
    parts: str = ""  # roles whose content may be parts, by their first letters
    text: bool = True  # whether content may be a string
    missing: object = "absent"  # content beside tool calls: absent, None, or ""
    reasoning: str = ""  # the member's name
    developer: bool = False  # whether it knows the role
    first_system: bool = True  # whether it knows that role


FAMILIES = {
    "command-r": Reads(),
    "deepseek-r1": Reads(arguments="text", missing=None),
    "functionary": Reads(arguments="text"),
    "gemma": Reads(arguments="none", parts="uas", first_system=False),
    "gemma-4": Reads(parts="uat", developer=True, reasoning="reasoning"),
    "glm-4.6": Reads(parts="sua", reasoning="reasoning_content"),
    "gpt-oss": Reads(reasoning="thinking", developer=True),
    "granite-4": Reads(parts="suat"),
    "kimi-k2": Reads(parts="sua"),
    "llama-3": Reads(),
    "mimo": Reads(),
    "minimax-m2": Reads(parts="suat", reasoning="reasoning_content"),
    "mistral-nemo": Reads(),
    "mistral-small": Reads(parts="ua"),
    "mixtral": Reads(arguments="none", missing=""),
    "olmo-2": Reads(arguments="none", missing=""),
    "parts-only": Reads(arguments="none", parts="suat", text=False),
    "phi-3.5": Reads(arguments="none", missing=""),
    "phi-4": Reads(arguments="none", missing=""),
    "qwen2.5": Reads(),
    "qwen3": Reads(missing="", reasoning="reasoning_content"),
    "qwen3-coder": Reads(),
    "qwq": Reads(missing=""),
    "seed-oss": Reads(reasoning="reasoning_content"),
    "smollm3": Reads(arguments="none", missing=""),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks <it> up & \"quotes\" 'it'.",
            "parameters": {
                "type": "object",
                "properties": {"id": {"type": "integer", "description": "Which."}},
                "required": ["id"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be <brief>."}
QUESTION = {"role": "user", "content": "Who is nº 1? 日本"}
AGAIN = {"role": "user", "content": "And who is 2?"}
CALL_ID = "abcdef123"


def call(arguments: object) -> Message:
    return {"id": CALL_ID, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def reply(**members: object) -> Message:
    return {"role": "assistant", **members}


ANSWER = {"role": "tool", "tool_call_id": CALL_ID, "name": "look_up", "content": '{"name": "Ann"}'}
SAYS = reply(content="Ann is.")
CALLS = reply(content=None, tool_calls=[call('{"id": 1, "é": [true, null]}')])
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def parts_in(role: str) -> list[Message]:
    match role:
        case "system":
            return [{**SYSTEM, "content": PARTS}, QUESTION]
        case "user":
            return [{**QUESTION, "content": PARTS}]
        case "assistant":
            return [QUESTION, {**SAYS, "content": PARTS}, AGAIN]
        case _:
            return [QUESTION, CALLS, {**ANSWER, "content": PARTS}]


CASES: dict[str, list[Message]] = {
    "plain": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "developer": [{**SYSTEM, "role": "developer"}, QUESTION],
    "turns": [SYSTEM, QUESTION, SAYS, AGAIN],
    "call": [QUESTION, CALLS, ANSWER],
    "call and answer": [SYSTEM, QUESTION, CALLS, ANSWER, SAYS, AGAIN],
    "arguments as an object": [QUESTION, reply(tool_calls=[call({"id": 1, "é": [True, None]})]), ANSWER],
    "no arguments": [QUESTION, reply(content=None, tool_calls=[call("")]), ANSWER],
    "null calls": [QUESTION, {**SAYS, "tool_calls": None, "refusal": None, "audio": None}, AGAIN],
    "empty calls": [QUESTION, {**SAYS, "tool_calls": [], "function_call": None}, AGAIN],
    "reasoning": [QUESTION, {**SAYS, "reasoning": "Hm."}, AGAIN],
    "reasoning by its older name": [QUESTION, {**SAYS, "reasoning_content": "Hm.", "reasoning": None}, AGAIN],
    "reasoning before a call": [QUESTION, {**CALLS, "reasoning": "Hm."}, ANSWER],
    "null content of the user": [SYSTEM, {**QUESTION, "content": None}],
    "no content of the user": [SYSTEM, {"role": "user"}],
    "null content of the system": [{**SYSTEM, "content": None}, QUESTION],
    "null content of the developer": [{"role": "developer", "content": None}, QUESTION],
    "null content of the tool": [QUESTION, CALLS, {**ANSWER, "content": None}],
    **{f"parts of the {role}": parts_in(role) for role in ("system", "user", "assistant", "tool")},
}


def as_read(message: Message, reads: Reads) -> Message:
    """The message as somebody would write it who knows the template."""
    message = {key: value for key, value in copy.deepcopy(message).items() if value not in (None, [])}
    if message["role"] == "developer" and not reads.developer:
        message["role"] = "system"
    role = message["role"]
    if role != "assistant":
        message.setdefault("content", "")
    content = message.get("content")
    if isinstance(content, list) and role[0] not in reads.parts:
        message["content"] = "\n".join(part["text"] for part in content)
    elif isinstance(content, str) and not reads.text:
        message["content"] = [{"type": "text", "text": content}]
    for tool_call in message.get("tool_calls", []):
        function = tool_call["function"]
        arguments = function["arguments"] or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        in_text = json.dumps(arguments, ensure_ascii=False)
        function["arguments"] = in_text if reads.arguments == "text" else arguments
        if content is None and reads.missing != "absent":
            message["content"] = reads.missing
    reasoning = message.pop("reasoning", None) or message.pop("reasoning_content", None)
    if reasoning and reads.reasoning:
        message[reads.reasoning] = reasoning
    return message


def by_transformers(messages: list[Message], template: str, reads: Reads, **variables: Any) -> str | None:
    """The prompt, None where the template refuses."""
    # what it would ask the clock for
    _compile_jinja_template(template).globals["strftime_now"] = lambda _format: DATE
    try:
        [prompt], _ = render_jinja_template(
            [[as_read(message, reads) for message in messages]],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<bos>",
            eos_token="<eos>",
            **variables,
        )
    except (jinja2.TemplateError, TypeError):
        return None
    return str(prompt)


def ours(messages: list[Message], template: str, **variables: Any) -> str:
    return render_chat(
        messages, template, bos_token="<bos>", eos_token="<eos>", add_generation_prompt=True, **variables
    )


@pytest.mark.parametrize("with_tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_that_of_transformers(family: str, case: str, with_tools: bool) -> None:
    template = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    messages, reads = CASES[case], FAMILIES[family]
    before = copy.deepcopy(messages)
    variables = {"tools": TOOLS if with_tools else None, "date_string": DATE}
    expected = by_transformers(messages, template, reads, **variables)
    if expected is None:
        with pytest.raises(RequestError):
            ours(messages, template, **variables)
    else:
        assert ours(messages, template, **variables) == expected
    assert messages == before


@pytest.mark.parametrize("family", [name for name, reads in FAMILIES.items() if reads.arguments != "none"])
def test_the_table_is_not_vacuous(family: str) -> None:
    """Nearly every case has a prompt, with the call's arguments in it, unescaped."""
    template = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    reads = FAMILIES[family]
    prompts = {case: by_transformers(messages, template, reads) for case, messages in CASES.items()}
    assert prompts["call"] is not None
    assert "é" in prompts["call"]
    assert '\\"id' not in prompts["call"]
    assert sum(prompt is None for prompt in prompts.values()) <= 2


def test_every_template_is_in_the_table_and_named_with_its_source() -> None:
    files = {path.stem for path in FOLDER.glob("*.jinja")}
    assert files == set(FAMILIES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.jinja`" in readme for name in files)
