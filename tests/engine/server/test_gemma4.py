"""Gemma 4 behind the server: its format is the default, and tools, forms, budgets and streams work in it."""

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
from small_tokenizers import gemma4_backend

from sempre.engine import LLM, ConfigError, SamplingParams, StructuredOutputsParams
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.server.body import parse_model
from sempre.engine.server.config import server_config, with_model_defaults
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.tools import ChatPlan
from sempre.engine.text.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parents[1] / "chat_templates" / "gemma-4.jinja"
CONFIG = {
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
BACKEND = gemma4_backend()
QUOTE = '<|"|>'
CHANNEL, CHANNEL_END, TURN_END = (BACKEND.token_to_id(text) for text in ("<|channel>", "<channel|>", "<turn|>"))
PROMPT = "<|turn>user\nWho?<turn|>\n<|turn>model\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with the format's tokens and template."""
    made = tmp_path_factory.mktemp("gemma-4")
    (made / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": [TURN_END]}))
    BACKEND.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<turn|>"}))
    shutil.copy(TEMPLATE, made / "chat_template.jinja")
    return made


def test_the_format_is_chosen_by_the_model_unless_another_is_named(folder: Path) -> None:
    chosen = with_model_defaults(server_config({}), folder)
    assert (chosen.reasoning_parser, chosen.tool_call_parser) == ("gemma4", "gemma4")
    assert chosen.enable_auto_tool_choice
    named = server_config({"reasoning_parser": "qwen3"})
    assert with_model_defaults(named, folder) is named
    assert server_config({"tool_call_parser": "gemma4"}).reasoning_parser == "gemma4"
    with pytest.raises(ConfigError, match="tool_call_parser: expected 'gemma4' beside reasoning_parser 'gemma4'"):
        server_config({"tool_call_parser": "hermes", "reasoning_parser": "gemma4"})


def answer(text: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """What the plan's own parser makes of a text."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    config = server_config({"tool_call_parser": "gemma4", "enable_auto_tool_choice": True})
    plan = ChatPlan.of(parse_model(body, ChatCompletionRequest), config)
    assert plan.reads_special_tokens
    tokenizer = Tokenizer(BACKEND)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    params = SamplingParams(skip_special_tokens=False)
    prepared = PreparedRequest("0", None, ids, params, [], [0], 0.0, PromptReasoning(tokenizer, ids))
    [parser] = plan.message_parsers(prepared, tokenizer, 1)
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    for delta in (
        parser.feed(text, tokenizer.encode(text, add_special_tokens=False)),
        (end := parser.finish("stop"))[0],
    ):
        found["content"] += delta.content or ""
        found["reasoning"] += delta.reasoning or ""
        found["calls"] += [(c.function.name, c.function.arguments) for c in delta.tool_calls or []]
    return found | {"reason": end[1]}


THOUGHT = "<|channel>thought\nHm.<channel|>"
CALLING = THOUGHT + '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
SAYING = THOUGHT + '{"city": "Oslo"}'


def test_answers() -> None:
    said = {"content": '{"city": "Oslo"}', "reasoning": "Hm.", "calls": [], "reason": "stop"}
    called = {"content": "", "reasoning": "Hm.", "calls": [("weather", '{"city": "Rome"}')], "reason": "tool_calls"}
    assert answer(SAYING) == answer(SAYING, tools=[WEATHER]) == said
    assert answer(CALLING, tools=[WEATHER]) == called
    unread = answer(CALLING, tools=[WEATHER], tool_choice="none")
    assert unread == {**said, "content": CALLING.removeprefix(THOUGHT)}
    assert answer(SAYING, include_reasoning=False) == {**said, "reasoning": ""}
    named = {"type": "function", "function": {"name": "weather"}}
    enforced = answer(SAYING, tools=[WEATHER], tool_choice=named)
    assert enforced == {**said, "content": "", "calls": [("weather", '{"city": "Oslo"}')]}
    listed = THOUGHT + '[{"name": "weather", "parameters": {"city": "Oslo"}}]'
    assert answer(listed, tools=[WEATHER], tool_choice="required")["calls"] == [("weather", '{"city": "Oslo"}')]
    inside = answer("Hm.<channel|>Yes.", PROMPT + "<|channel>thought\n")
    assert (inside["reasoning"], inside["content"]) == ("Hm.", "Yes.")


FORMED = re.compile(r"(<\|channel>(?P<thoughts>.*)<channel\|>)?\s{0,4}(ONE|TWO)", re.DOTALL)


def test_a_form_follows_the_thoughts_and_a_budget_ends_them(folder: Path) -> None:
    form = StructuredOutputsParams(choice=["ONE", "TWO"], after_reasoning=True)
    common: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "skip_special_tokens": False}
    # random weights have their preference, and their thoughts would not end
    thinks = {CHANNEL: 30.0, CHANNEL_END: 30.0}
    params = [
        SamplingParams(seed=seed, structured_outputs=form, logit_bias=thinks if seed % 2 else None, **common)
        for seed in range(8)
    ]
    with LLM(str(folder), load_format="dummy", multiprocessing=False, max_model_len=512, num_threads=1) as llm:
        outputs = [output.outputs[0] for output in llm.generate([PROMPT] * 8, params, use_tqdm=False)]
        found = [FORMED.fullmatch(output.text.removesuffix("<turn|>")) for output in outputs]
        whole = [output.finish_reason == "stop" for output in outputs]
        assert [match is not None for match in found] == whole, [output.text for output in outputs]
        thoughts = {match["thoughts"] for match in found if match is not None}
        assert None in thoughts
        assert thoughts != {None}, [(o.finish_reason, o.text) for o in outputs]
        [answered] = llm.generate([PROMPT + "<|channel>thought\n<channel|>"], params[1], use_tqdm=False)
        assert answered.outputs[0].text.removesuffix("<turn|>") in ("ONE", "TWO")
        for prompt, before in ((PROMPT, 1), (PROMPT + "<|channel>thought\n", 0)):
            budget = SamplingParams(thinking_token_budget=5, seed=3, logit_bias={CHANNEL: 30.0}, **common)
            [limited] = llm.generate([prompt], budget, use_tqdm=False)
            token_ids = list(limited.outputs[0].token_ids)
            assert CHANNEL_END not in token_ids[: before + 5]
            assert token_ids[before + 5] == CHANNEL_END


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    flags = ("--max-model-len", "1024", "--load-format", "dummy", "--served-model-name", "tiny")
    log_path = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log_path, *flags, model=str(folder), environment={"OMP_NUM_THREADS": "1"}) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            yield made
        server.terminate()
        assert server.process.wait(30) == 0


def tag(text: str) -> str:
    return f"<[{BACKEND.token_to_id(text)}]>"


# random weights would hardly write a call
CALL = (
    f'start: /[a-z]{{2,5}}/ {tag("<|tool_call>")} "call:" /[a-z]{{3}}/ "{{n:" /[0-9]{{2}}/ ",t:" {tag(QUOTE)}'
    f' /[a-z, ]{{1,4}}/ {tag(QUOTE)} "}}" {tag("<tool_call|>")}'
)


def parts(client: openai.OpenAI, *, stream: bool, **fields: Any) -> list[Any]:
    settings: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Does it rain?"}],
        "max_tokens": 100,
        "temperature": 1.0,
        "tools": [WEATHER],
        "tool_choice": "auto",
        **fields,
    }
    if not stream:
        [choice] = client.chat.completions.create(**settings).choices
        message = choice.message
        calls = [[c.function.name, c.function.arguments] for c in message.tool_calls or []]
        return [getattr(message, "reasoning", None) or "", message.content or "", calls, choice.finish_reason]
    found: list[Any] = ["", "", [], None]
    for chunk in client.chat.completions.create(**settings, stream=True):
        [part] = chunk.choices
        found[0] += getattr(part.delta, "reasoning", None) or ""
        found[1] += part.delta.content or ""
        for item in part.delta.tool_calls or []:
            if item.function.name:
                found[2].append([item.function.name, ""])
            found[2][-1][1] += item.function.arguments or ""
        found[3] = part.finish_reason or found[3]
    return found


def test_a_stream_has_the_parts_of_the_whole_message(client: openai.OpenAI) -> None:
    thinking = {"enable_thinking": True}
    bias = {str(CHANNEL): 30.0, str(CHANNEL_END): -30.0}
    thought = []
    for seed in range(4):
        asked: dict[str, Any] = {"seed": seed, "extra_body": {"structured_outputs": {"grammar": CALL}}}
        if seed % 2:
            asked["logit_bias"] = bias
            asked["extra_body"] |= {"chat_template_kwargs": thinking, "thinking_token_budget": 6}
        reasoning, content, [[name, arguments]], reason = whole = parts(client, stream=False, **asked)
        assert parts(client, stream=True, **asked) == whole
        thought.append(reasoning)
        assert re.fullmatch("[a-z]{2,5}", content.strip())
        assert re.fullmatch("[a-z]{3}", name)
        assert re.fullmatch(r'{"n": ([0-9]{2}|"0[0-9]"), "t": "[a-z, ]{1,4}"}', arguments)
        assert reason == "tool_calls"
    assert thought[0] == thought[2] == ""
    assert thought[1]
    assert thought[3]
    asked = {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "seed": 5}
    whole = parts(client, stream=False, **asked)
    assert parts(client, stream=True, **asked) == whole
    [[name, arguments]] = whole[2]
    assert name == "weather"
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")


def test_free_outputs_of_any_kind_are_read(client: openai.OpenAI) -> None:
    """Random weights write broken ones."""
    bias = {str(BACKEND.token_to_id(text)): 12.0 for text in ("<|tool_call>", "<tool_call|>", "<|channel>", QUOTE)}
    for seed in range(4):
        asked: dict[str, Any] = {"seed": seed, "temperature": 2.0, "logit_bias": bias | {str(TURN_END): -100.0}}
        whole = parts(client, stream=False, **asked)
        assert parts(client, stream=True, **asked) == whole
        assert any(whole[:3])
