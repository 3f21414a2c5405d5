"""gpt-oss behind the server: its format is the default, and tools, forms and streams work in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import ServerProcess
from small_tokenizers import harmony_backend

from sempre.engine import LLM, ConfigError, RequestError, SamplingParams, StructuredOutputsParams
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.server.body import parse_model
from sempre.engine.server.config import server_config, with_model_defaults
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.tools import ChatPlan
from sempre.engine.text.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parents[1] / "chat_templates" / "gpt-oss.jinja"
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
BACKEND = harmony_backend()
IDS = {name: BACKEND.token_to_id(f"<|{name}|>") for name in ("return", "call", "end")}
PROMPT = "<|start|>user<|message|>Who?<|end|><|start|>assistant"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with harmony's tokens and template."""
    made = tmp_path_factory.mktemp("gpt-oss")
    (made / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": [IDS["return"], IDS["call"]]}))
    BACKEND.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))
    shutil.copy(TEMPLATE, made / "chat_template.jinja")
    return made


def test_the_format_is_chosen_by_the_model(folder: Path, tmp_path: Path) -> None:
    plain = server_config({})
    chosen = with_model_defaults(plain, folder)
    assert (chosen.reasoning_parser, chosen.tool_call_parser, chosen.enable_auto_tool_choice) == (
        "openai_gptoss",
        "openai",
        True,
    )
    assert with_model_defaults(plain, tmp_path) is plain
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["LlamaForCausalLM"]}))
    assert with_model_defaults(plain, tmp_path) is plain
    assert server_config({"tool_call_parser": "openai"}).reasoning_parser == "openai_gptoss"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"tool_call_parser": "openai", "reasoning_parser": "qwen3"}, "found 'openai' beside 'qwen3'"),
        ({"tool_call_parser": "hermes", "reasoning_parser": "openai_gptoss"}, "found 'hermes' beside 'openai_gptoss'"),
    ],
)
def test_two_formats_at_once_are_refused(settings: dict[str, Any], found: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"tool_call_parser: expected 'openai' beside .*{found}"):
        server_config(settings)
    with pytest.raises(ConfigError, match="tool_call_parser: expected 'openai' beside"):
        with_model_defaults(server_config({"tool_call_parser": "llama3_json"}), folder)


def answer(text: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """What the plan's own parser makes of a text."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    plan = ChatPlan.of(parse_model(body, ChatCompletionRequest), server_config({"tool_call_parser": "openai"} | AUTO))
    tokenizer = Tokenizer(BACKEND)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    params = SamplingParams(skip_special_tokens=False)
    prepared = PreparedRequest("0", None, ids, params, [], [0], 0.0, PromptReasoning(tokenizer, ids))
    [parser] = plan.message_parsers(prepared, tokenizer, 1)
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for delta in (parser.feed(text, token_ids), (end := parser.finish("stop"))[0]):
        found["content"] += delta.content or ""
        found["reasoning"] += delta.reasoning or ""
        found["calls"] += [(c.function.name, c.function.arguments) for c in delta.tool_calls or []]
    if found["reasoning"]:
        answered = text.rindex("<|message|>") + len("<|message|>")
        assert parser.num_reasoning_tokens == len(tokenizer.encode(text[:answered], add_special_tokens=False))
    return found | {"reason": end[1]}


AUTO: dict[str, Any] = {"enable_auto_tool_choice": True}
TEXT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
CALLING = TEXT + 'commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
SAYING = TEXT + 'final<|message|>{"city": "Oslo"}'


def test_answers() -> None:
    said = {"content": '{"city": "Oslo"}', "reasoning": "Hm.", "calls": [], "reason": "stop"}
    called = {"content": "", "reasoning": "Hm.", "calls": [("weather", '{"city": "Rome"}')], "reason": "tool_calls"}
    assert answer(SAYING) == answer(SAYING, tools=[WEATHER]) == said
    assert answer(CALLING, tools=[WEATHER]) == called
    assert answer(CALLING, tools=[WEATHER], tool_choice="none") == {**said, "content": '{"city": "Rome"}'}
    assert answer(SAYING, include_reasoning=False) == {**said, "reasoning": ""}
    named = {"type": "function", "function": {"name": "weather"}}
    enforced = answer(SAYING, tools=[WEATHER], tool_choice=named)
    assert enforced == {**said, "content": "", "calls": [("weather", '{"city": "Oslo"}')]}
    listed = TEXT + 'final<|message|>[{"name": "weather", "parameters": {"city": "Oslo"}}]'
    assert answer(listed, tools=[WEATHER], tool_choice="required")["calls"] == [("weather", '{"city": "Oslo"}')]
    assert answer("It rains.")["content"] == "It rains."
    assert answer("n.", PROMPT + "<|channel|>final<|message|>An")["content"] == "n."


FORMED = re.compile(
    r"(<\|channel\|>analysis<\|message\|>(?P<thoughts>.*)<\|end\|><\|start\|>assistant)?"
    r"<\|channel\|>final<\|message\|>\s{0,4}(ONE|TWO)",
    re.DOTALL,
)


def test_a_form_is_that_of_the_final_message(folder: Path) -> None:
    form = StructuredOutputsParams(choice=["ONE", "TWO"], after_reasoning=True)
    common: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "skip_special_tokens": False}
    # random weights have their preference, and their thoughts would not end
    thinks = {BACKEND.encode("analysis").ids[0]: 30.0, IDS["end"]: 30.0}
    params = [
        SamplingParams(seed=seed, structured_outputs=form, logit_bias=thinks if seed % 2 else None, **common)
        for seed in range(12)
    ]
    with LLM(str(folder), load_format="dummy", multiprocessing=False, max_model_len=512, num_threads=1) as llm:
        outputs = [output.outputs[0] for output in llm.generate([PROMPT] * 12, params, use_tqdm=False)]
        found = [
            FORMED.fullmatch(output.text.removesuffix("<|return|>").removesuffix("<|call|>")) for output in outputs
        ]
        whole = [output.finish_reason == "stop" for output in outputs]
        assert [match is not None for match in found] == whole, [output.text for output in outputs]
        thoughts = {match["thoughts"] for match in found if match is not None}
        assert None in thoughts
        assert thoughts != {None}
        begun = PROMPT + "<|channel|>final<|message|>"
        [inside] = llm.generate([begun], params[0], use_tqdm=False)
        assert inside.outputs[0].text.removesuffix("<|return|>").removesuffix("<|call|>") in ("ONE", "TWO")
        with pytest.raises(RequestError, match="thinking_token_budget is for reasoning between <think> and </think>"):
            llm.generate([PROMPT], SamplingParams(thinking_token_budget=5, **common), use_tqdm=False)


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    flags = ("--max-model-len", "1024", "--load-format", "dummy", "--served-model-name", "tiny")
    log_path = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log_path, *flags, model=str(folder), environment={"OMP_NUM_THREADS": "1"}) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            yield made
        server.terminate()
        assert server.process.wait(30) == 0


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    settings: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Does it rain?"}],
        "seed": 5,
        "max_tokens": 80,
        "reasoning_effort": "low",
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "logit_bias": {str(IDS["end"]): 6.0},
        "extra_body": {"chat_template_kwargs": {"date_string": "2025-06-28"}},
        **fields,
    }
    return client.chat.completions.create(**settings)


def test_a_stream_has_the_parts_of_the_whole_message(client: openai.OpenAI) -> None:
    [choice] = ask(client).choices
    [call] = choice.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    reasoning, name, arguments, text = "", "", "", ""
    for chunk in ask(client, stream=True):
        [part] = chunk.choices
        delta = part.delta
        reasoning += getattr(delta, "reasoning", None) or ""
        text += delta.content or ""
        for item in delta.tool_calls or []:
            name += item.function.name or ""
            arguments += item.function.arguments or ""
    assert (name, arguments) == ("weather", call.function.arguments)
    assert (reasoning or None, text) == (getattr(choice.message, "reasoning", None), choice.message.content or "")
    assert not any(tag in reasoning + arguments for tag in ("<|channel|>", "<|message|>", "<|end|>"))


def test_free_outputs_of_any_kind_are_read(client: openai.OpenAI) -> None:
    """Random weights write broken messages."""
    for seed in range(4):
        fields: dict[str, Any] = {"tool_choice": "auto", "logit_bias": {}, "seed": seed, "temperature": 2.0}
        [choice] = ask(client, **fields).choices
        assert choice.finish_reason in ("length", "stop", "tool_calls")
