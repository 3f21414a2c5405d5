"""/v1/responses with OpenAI's own client, against a model that calls tools as a script says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted_agent_server import scripted_agent
from server_process import ServerProcess

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
    {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": None},
]
ASK: dict[str, Any] = {"model": "tiny", "input": "What weather?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with scripted_agent(tmp_path_factory.mktemp("responses")) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def run_tool(call: Any) -> str:
    return f"{json.loads(call.arguments)['city']}: rain" if call.name == "weather" else "noon"


def told(response: Any) -> list[dict[str, Any]]:
    """What a response says, without the ids of items, which are made of the request's."""
    return [item.model_dump(exclude={"id", "parsed_arguments"}, exclude_none=True) for item in response.output]


def loop(client: openai.OpenAI, *, seed: int, stream: bool, **fields: Any) -> list[Any]:
    """The answers of an agent that runs the tools until the model calls none, and keeps its own history."""
    items: list[Any] = [{"role": "user", "content": "What weather?"}]
    answers = []
    while True:
        asked: dict[str, Any] = {"model": "tiny", "input": items, "tools": TOOLS, "store": False, **fields}
        asked["extra_body"] = {"seed": seed}
        if stream:
            with client.responses.stream(**asked) as events:
                answer: Any = events.get_final_response()
        else:
            answer = client.responses.create(**asked)
        answers.append(answer)
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return answers
        items += answer.output
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": run_tool(call)} for call in calls]


def test_a_loop_of_tools_is_the_same_streamed_or_not_and_again(client: openai.OpenAI) -> None:
    whole = loop(client, seed=7, stream=False)
    kinds = [[item.type for item in answer.output] for answer in whole]
    calls = ["function_call", "function_call"]
    assert kinds == [["reasoning", "message", *calls], ["reasoning", "function_call"], ["reasoning", "message"]]
    assert {answer.status for answer in whole} == {"completed"}
    assert whole[0].output[2].arguments.endswith('"days": [1, 2.50]}')
    cities = [json.loads(answer.output[place].arguments)["city"] for answer, place in zip(whole, (2, 1), strict=False)]
    assert whole[2].output_text == f"\n\nI found: {cities[0]}: rain; noon; {cities[1]}: rain."
    assert {answer.seed for answer in whole} == {7}
    for again in (loop(client, seed=7, stream=True), loop(client, seed=7, stream=False)):
        # the ids of calls, too: they are part of the next prompt
        assert [told(answer) for answer in again] == [told(answer) for answer in whole]
        assert [answer.usage.output_tokens for answer in again] == [answer.usage.output_tokens for answer in whole]
    other = loop(client, seed=8, stream=False)
    assert [told(answer) for answer in other] != [told(answer) for answer in whole]


def test_reasoning_goes_back_in_either_form(client: openai.OpenAI) -> None:
    """Codex drops the content of reasoning and sends what was asked for as encrypted."""
    include: Any = ["reasoning.encrypted_content"]
    first = client.responses.create(**ASK, tools=TOOLS, include=include, extra_body={"seed": 7})
    assert first.output[0].type == "reasoning"
    assert first.output[0].encrypted_content

    def again(**without: Any) -> Any:
        items = [item.model_dump(exclude_none=True) for item in first.output]
        items[0] = {name: value for name, value in items[0].items() if name not in without["without"]}
        items = [{"role": "user", "content": "What weather?"}, *items]
        items += [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "x"}
            for item in items
            if item.get("type") == "function_call"
        ]
        return client.responses.create(model="tiny", input=items, tools=TOOLS, extra_body={"seed": 7}).usage

    counts = [again(without=names).input_tokens for names in (("content",), ("encrypted_content",))]
    assert counts[0] == counts[1] > again(without=("content", "encrypted_content")).input_tokens
    plain = client.responses.create(**ASK, tools=TOOLS, extra_body={"seed": 7})
    assert plain.output[0].type == "reasoning"
    assert plain.output[0].encrypted_content is None


def events(server: ServerProcess, **fields: Any) -> list[Any]:
    answer = server.http.post("/v1/responses", json={**ASK, **fields, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        event, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert event.removeprefix("event: ") == found[-1]["type"]
    return found


def test_the_events_of_a_stream_are_openais(server: ServerProcess) -> None:
    found = events(server, tools=TOOLS, seed=7)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert (kinds[:2], kinds[-1]) == (["created", "in_progress"], "completed")
    last = found[-1]["response"]
    for index, item in enumerate(last["output"]):
        of_item = [e for e in found if e.get("output_index") == index]
        assert [e["type"] for e in (of_item[0], of_item[-1])] == [
            "response.output_item.added",
            "response.output_item.done",
        ]
        assert of_item[-1]["item"] == item
        assert {e.get("item_id", item["id"]) for e in of_item} == {item["id"]}
        deltas = "".join(e["delta"] for e in of_item if e["type"].endswith(".delta"))
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert deltas == text
        [done] = [e for e in of_item if e["type"].endswith(("text.done", "arguments.done"))]
        assert done.get("text", done.get("arguments")) == text
    whole = server.http.post("/v1/responses", json={**ASK, "tools": TOOLS, "seed": 7}).json()
    assert last["usage"] | {"input_tokens_details": None} == whole["usage"] | {"input_tokens_details": None}
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["output_tokens"]
    assert (whole["store"], whole["previous_response_id"], whole["tools"]) == (
        False,
        None,
        found[0]["response"]["tools"],
    )


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI, server: ServerProcess) -> None:
    whole = client.responses.create(**ASK, max_output_tokens=3)
    assert whole.incomplete_details is not None
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in whole.output] == ["incomplete"]  # type: ignore[union-attr]
    assert events(server, max_output_tokens=3)[-1]["type"] == "response.incomplete"


def prompt_length(server: ServerProcess, **fields: Any) -> int:
    answer = server.http.post("/v1/responses", json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["input_tokens"]
    return found


def test_inputs_of_one_meaning_have_one_prompt(server: ServerProcess) -> None:
    text = {"type": "input_text", "text": "What weather?"}
    forms: list[Any] = ["What weather?", [{"role": "user", "content": "What weather?"}]]
    forms += [[{"type": "message", "role": "user", "content": [text], "id": None, "status": "completed"}]]
    assert len({prompt_length(server, input=form) for form in forms}) == 1
    told = [
        {"instructions": "Be brief.\n\nBe kind."},
        {"instructions": "Be brief.", "input": [{"role": "developer", "content": "Be kind."}, *forms[1]]},
        {"input": [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, *forms[1]]},
    ]
    lengths = {prompt_length(server, **fields) for fields in told}
    assert len(lengths) == 1
    assert lengths.pop() > prompt_length(server)


def test_neutral_fields_and_nulls_change_nothing(server: ServerProcess) -> None:
    base = {**ASK, "tools": TOOLS, "seed": 3}
    expected = [{**item, "id": ""} for item in server.http.post("/v1/responses", json=base).json()["output"]]
    neutral = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "background": False,
        "prompt_cache_key": "k", "safety_identifier": "s", "truncation": "auto", "max_tool_calls": 9,
        "include": ["file_search_call.results"], "reasoning": {"summary": "auto"}, "text": {"verbosity": "medium"},
        "tool_choice": "auto", "parallel_tool_calls": True, "stream_options": {"include_obfuscation": False},
        **dict.fromkeys(["previous_response_id", "conversation", "prompt", "instructions", "top_p"]),
    }  # fmt: skip
    answer = server.http.post("/v1/responses", json={**base, **neutral}).json()
    assert [{**item, "id": ""} for item in answer["output"]] == expected
    assert answer["metadata"] == {"a": "b"}


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "conv_1"}, "conversation", "stores no responses"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "stores none"),
        ({"prompt": {"id": "pmpt"}}, "prompt", "not supported"),
        ({"background": True}, "background", "false only"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type",
            "input_file",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id", "x"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "?"}]},
            "input[0].encrypted_content",
            "not made by this server",
        ),
        ({"input": []}, "input", "at least one"),
        ({"input": [{"content": "a"}]}, "input[0].role", "missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.type", "allowed_tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice", "nobody"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", "expected one of"),
        ({"top_logprobs": 3}, "top_logprobs", "0 only"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "text.format", "no"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"input": "a " * 5000}, "input", "longer"),
        ({"instruction": "x"}, "instruction", "instructions"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "4"),
    ],
)
def test_what_is_not_built_is_named(server: ServerProcess, fields: dict[str, Any], param: str, told: str) -> None:
    for more in ({}, {"stream": True}):
        answer = server.http.post("/v1/responses", json={**ASK, **fields, **more})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["param"], error["type"]) == (param, "BadRequestError")
        assert told in error["message"]


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    made = client.responses.create(**ASK, store=True)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            call(made.id)
