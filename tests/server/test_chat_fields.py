"""Which parts of a chat request reach the template, and answers sent back as messages, against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from server_process import ServerProcess

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if reasoning_effort %}[effort: {{ reasoning_effort }}]{% endif %}"
    "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "Who?"}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = r'<tool_call>\n\{"name": "clock", "arguments": \{\}\}\n</tool_call>'
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
COMMON: dict[str, Any] = {"seed": 5, "max_tokens": 60, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "template.jinja").write_text(TEMPLATE)
    flags = ["--max-model-len", "512", "--num-threads", "1", "--chat-template", str(folder / "template.jinja")]
    flags += [
        "--enable-per-request-metrics",
        "--reasoning-parser",
        "qwen3",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ]
    flags += ["--structured-outputs-config.disable_any_whitespace", "true"]
    flags += ["--structured-outputs-config.disable_additional_properties", "true"]
    with ServerProcess(folder / "log", *flags) as process:
        yield process


def ask(server: ServerProcess, messages: list[Any], **fields: Any) -> Any:
    answer = server.http.post("/v1/chat/completions", json={**COMMON, "messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompt_of(server: ServerProcess, answer: Any) -> str:
    return str(server.http.post("/detokenize", json={"tokens": answer["prompt_token_ids"]}).json()["prompt"])


def message_of(answer: Any) -> Any:
    return answer["choices"][0]["message"]


def streamed(server: ServerProcess, messages: list[Any], **fields: Any) -> dict[str, str]:
    """What the deltas of a stream add up to."""
    body = {**COMMON, "messages": messages, **fields, "stream": True}
    found = {"reasoning": "", "content": ""}
    for line in server.http.post("/v1/chat/completions", json=body).text.splitlines():
        if line and line != "data: [DONE]":
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            for name in found:
                found[name] += delta.get(name) or ""
    return found


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_the_effort_reaches_the_template(server: ServerProcess, effort: str) -> None:
    assert f"[effort: {effort}]" in prompt_of(server, ask(server, [USER], max_tokens=1, reasoning_effort=effort))


def test_without_effort_the_template_has_none(server: ServerProcess) -> None:
    for fields in ({}, {"reasoning_effort": None}):
        assert "effort" not in prompt_of(server, ask(server, [USER], max_tokens=1, **fields))
    variables = {"reasoning_effort": "as I say"}
    told = ask(server, [USER], max_tokens=1, chat_template_kwargs=variables)
    assert "[effort: as I say]" in prompt_of(server, told)


def test_documents_reach_the_template(server: ServerProcess) -> None:
    documents = [{"title": "A", "text": "first"}, {"title": "B", "text": "second"}]
    assert "[A: first][B: second]" in prompt_of(server, ask(server, [USER], max_tokens=1, documents=documents))
    for neutral in ([], None):
        assert "[" not in prompt_of(server, ask(server, [USER], max_tokens=1, documents=neutral))


def test_what_was_answered_may_be_sent_back(server: ServerProcess) -> None:
    """An assistant message as it came, every null and empty member in it: with reasoning alone, and with a call."""
    thinking = {"role": "assistant", "content": "<think>\n"}
    only_thoughts = ask(server, [USER, thinking], **CONTINUED, max_tokens=4, ignore_eos=True)
    thought = message_of(only_thoughts)
    assert (thought["content"], "tool_calls" in thought) == (None, False)
    assert thought["reasoning"]
    again = ask(server, [USER, thought, USER], max_tokens=1)
    assert f"<think>\n{thought['reasoning']}\n</think>" in prompt_of(server, again)

    form = {"structured_outputs": {"regex": CALL}, "thinking_token_budget": 4, "tools": [CLOCK]}
    called = message_of(ask(server, [USER, thinking], **CONTINUED, **form))
    assert (called["content"], [call["function"]["name"] for call in called["tool_calls"]]) == (None, ["clock"])
    assert called["reasoning"]
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "Noon."}
    prompt = prompt_of(server, ask(server, [USER, called, result], max_tokens=1, tools=[CLOCK]))
    assert f"<think>\n{called['reasoning']}\n</think>" in prompt
    assert re.search(r'<tool_call>\n\{"name": "clock", "arguments": ("\{\}"|\{\})\}\n</tool_call><\|im_end\|>', prompt)
    assert "None" not in prompt
    assert "null" not in prompt


def test_reasoning_that_a_message_has_begun_goes_on(server: ServerProcess) -> None:
    begun = [USER, {"role": "assistant", "content": "<think>\nLet me see: who"}]
    form = {"structured_outputs": {"choice": ["yes", "no"]}, "thinking_token_budget": 6}
    answer = ask(server, begun, **CONTINUED, **form)
    message = message_of(answer)
    assert prompt_of(server, answer).endswith("<think>\nLet me see: who")
    # there may be white space between the two
    assert message["content"].strip() in ("yes", "no")
    assert message["reasoning"]
    assert message["reasoning_content"] == message["reasoning"]
    assert streamed(server, begun, **CONTINUED, **form) == {name: message[name] for name in ("reasoning", "content")}
    free = message_of(ask(server, begun, **CONTINUED, max_tokens=6, ignore_eos=True))
    assert (free["content"], bool(free["reasoning"])) == (None, True)


@pytest.mark.parametrize("n", [1, 2])
def test_usage_counts_the_tokens_of_reasoning(server: ServerProcess, n: int) -> None:
    """Up to the end of its last tag, hidden or not, streamed or not."""
    begun = [USER, {"role": "assistant", "content": "<think>\nLet me see: who"}]
    form = {"structured_outputs": {"choice": ["yes", "no"]}, "thinking_token_budget": 6}
    end = server.http.post("/tokenize", json={"prompt": "</think>"}).json()["count"]

    def counted(messages: list[Any], **fields: Any) -> int:
        return int(ask(server, messages, **fields)["usage"]["completion_tokens_details"]["reasoning_tokens"])

    assert counted(begun, **CONTINUED, **form, n=n) == n * (6 + end)
    assert counted(begun, **CONTINUED, **form, n=n, include_reasoning=False) == n * (6 + end)
    assert counted(begun, **CONTINUED, n=n, max_tokens=5, ignore_eos=True) == n * 5
    assert counted([USER], n=n, max_tokens=5, structured_outputs={"regex": "no+"}) == 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**COMMON, "messages": begun, **CONTINUED, **form, "n": n, "stream": True, "stream_options": options}
    lines = server.http.post("/v1/chat/completions", json=body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    counts = [chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks]
    assert (counts[0], counts[-1]) == (0, n * (6 + end))
    assert counts == sorted(counts)


def test_a_request_may_tell_its_times(server: ServerProcess) -> None:
    """Only those of a request with one prompt, and at the end of a stream."""

    def told(answer: Any) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json().get("metrics")

    always = {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "tokens_per_second"}
    for fields, names in (
        ({"max_tokens": 4, "ignore_eos": True}, always | {"mean_itl_ms"}),
        ({"max_tokens": 1}, always),
    ):
        for times in (
            told(server.http.post("/v1/chat/completions", json={"messages": [USER], **fields})),
            told(server.complete(prompt="It is", **fields)),
        ):
            assert set(times) == names
            assert all(value >= 0 for value in times.values())
    assert told(server.complete(prompt=["It is", "It was"], max_tokens=1)) is None
    streamed = server.complete(prompt="It is", max_tokens=2, stream=True, stream_options={"include_usage": True})
    *chunks, last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line[6:] not in ("", "[DONE]")]
    assert always <= set(last["metrics"])
    assert not any("metrics" in chunk for chunk in chunks)


def test_an_answer_that_a_message_has_begun_goes_on(server: ServerProcess) -> None:
    for content in ("<think>\nOne.\n</think>\n\nIt is", "It is"):
        begun = [USER, {"role": "assistant", "content": content}]
        message = message_of(ask(server, begun, **CONTINUED, max_tokens=6, ignore_eos=True))
        assert message["content"]
        assert message["reasoning"] is None


# What the server's settings say of forms


def test_a_servers_setting_holds_for_forms_that_do_not_say_otherwise(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x y"]}},
        "required": ["a", "b"],
    }
    at_once = [USER, {"role": "assistant", "content": "<think>\n\n</think>\n\n"}]

    def texts(**form: Any) -> list[str]:
        answer = ask(server, at_once, **CONTINUED, temperature=1.5, n=8, **form)
        return [choice["message"]["content"] for choice in answer["choices"]]

    compact = re.compile(r'\{"a":\d,"b":"x y"\}')
    as_format = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    for form in (as_format, {"structured_outputs": {"json": schema}}):
        assert all(compact.fullmatch(text) for text in texts(**form))
    # the request's own setting wins: white space where it says so, and other properties
    spaced = {"json": schema, "whitespace_pattern": "  ", "disable_any_whitespace": False}
    assert all("  " in text.replace("x y", "") for text in texts(structured_outputs=spaced))
    opened = {"json": {**schema, "additionalProperties": {"const": 1}}}
    assert not all(compact.fullmatch(text) for text in texts(structured_outputs=opened))
