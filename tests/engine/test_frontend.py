"""What a front end takes from the model's folder, and from the engine that has become ready."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sempre.engine import SamplingParams
from sempre.engine.arguments import parse_arguments
from sempre.engine.frontend.frontend import Frontend
from sempre.ipc.errors import ModelError, RequestError
from sempre.ipc.messages import EngineReady

READY = EngineReady(
    vocab_size=4096, max_model_len=64, eos_token_ids=[7], num_blocks=4, block_size=16, world_size=1, fingerprint={}
)
ALL_FIELDS = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.05,
    "max_new_tokens": 9,
    "skip_special_tokens": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = parse_arguments("tiny", {})[0].model_path
    return Path(shutil.copytree(source, tmp_path / "model"))


def frontend(folder: Path, defaults: Any, **keywords: Any) -> Frontend:
    """Of the model with `defaults` in its generation_config.json."""
    text = defaults if isinstance(defaults, str) else json.dumps(defaults)
    (folder / "generation_config.json").write_text(text)
    return Frontend(parse_arguments(folder, keywords))


def test_the_model_s_own_defaults(folder: Path) -> None:
    found = frontend(folder, {**ALL_FIELDS, "eos_token_id": 2, "do_sample": True, "typical_p": None})
    ours = {**ALL_FIELDS, "max_tokens": 9}
    del ours["max_new_tokens"]
    assert found.default_sampling_params == SamplingParams(**ours)
    assert frontend(folder, {"top_p": None}).default_sampling_params == SamplingParams()
    assert frontend(folder, ALL_FIELDS, generation_config="vllm").default_sampling_params == SamplingParams()


@pytest.mark.parametrize(
    ("defaults", "message"), [("{", "is not valid JSON"), ({"top_p": 7}, r"top_p.*generation_config='vllm'")]
)
def test_defaults_that_cannot_be_used_are_refused(folder: Path, defaults: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"generation_config.json.*{message}"):
        frontend(folder, defaults)


def test_the_end_tokens_of_tokenizer_and_model_both_end_an_output(folder: Path) -> None:
    found = frontend(folder, {})
    found.connect(READY)
    (own,) = found.tokenizer.eos_token_ids
    [sequence] = found.builder.build("It is", SamplingParams()).sequences
    assert sequence.params.eos_token_ids == [own, 7]


def test_the_content_format_is_the_engine_s_unless_the_call_says_otherwise(folder: Path) -> None:
    template = "{% for p in messages[0].content %}{{ p.text if p is mapping else p }};{% endfor %}"
    found = frontend(folder, {}, chat_template=template, chat_template_content_format="openai")
    messages = [{"role": "user", "content": "ab"}]
    assert found.render_chat(messages)["prompt"] == "ab;"
    assert found.render_chat(messages, chat_template_content_format="string")["prompt"] == "a;b;"


def test_a_template_s_variables_cannot_replace_the_engine_s_own(folder: Path) -> None:
    with pytest.raises(RequestError, match="must not hold 'tokenize'") as refusal:
        frontend(folder, {}).render_chat([{"role": "user", "content": "a"}], chat_template_kwargs={"tokenize": True})
    assert refusal.value.parameter == "chat_template_kwargs"


MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "look_up"}}]


def test_what_a_template_does_not_read_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    deaf = Frontend(parse_arguments("tiny", {"chat_template": "{{ messages[0].content }}"}))
    for _ in range(3):
        deaf.render_chat(MESSAGES, tools=TOOLS, chat_template_kwargs={"enable_thinking": True, "a\nb": 1})
    assert caplog.messages == [
        "the chat template does not read tools: the model does not see the tools of requests",
        "the chat template does not read the variable enable_thinking; it has no effect",
        "the chat template does not read the variable a\\nb; it has no effect",
    ]
    caplog.clear()
    for number in range(100):
        deaf.render_chat(MESSAGES, chat_template_kwargs={f"name{number}": 1})
    assert len(caplog.messages) < 40, "names come from strangers"
    caplog.clear()
    template = "{{ messages[0].content }}{{ tools | length }}{{ enable_thinking }}{{ strftime_now('%Y') }}"
    hears = Frontend(parse_arguments("tiny", {"chat_template": template}))
    variables = {"enable_thinking": True, "date_string": "26 Jul 2024"}
    assert (
        hears.render_chat(MESSAGES, tools=TOOLS, chat_template_kwargs=variables).get("prompt") == "Hi1True26 Jul 2024"
    )
    assert caplog.messages == []


@pytest.mark.parametrize("content_format", ["auto", "openai"])
def test_a_template_may_read_more_of_a_part_than_its_text(content_format: Any) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}[{{ p.lang }}]{% endfor %}{% endfor %}"
    front = Frontend(parse_arguments("tiny", {"chat_template": template}))
    parts = [{"type": "text", "text": "a", "lang": "en"}, {"type": "input_text", "text": "b", "lang": None}, "c"]
    prompt = front.render_chat([{"role": "user", "content": parts}], chat_template_content_format=content_format)
    assert prompt.get("prompt") == "a[en]b[None]c[]"
