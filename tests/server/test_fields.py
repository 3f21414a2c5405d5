"""Fields and endpoints that vLLM has beside OpenAI's, over HTTP: each has its effect."""

from __future__ import annotations

import base64
import io
import json
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pytest
from server_process import ServerProcess

from sempre.engine.server.agents.messages_requests import MessagesRequest
from sempre.engine.server.agents.responses_requests import ResponsesRequest
from sempre.engine.server.neutral import NEUTRAL
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

CHAT = {"messages": [{"role": "user", "content": "Who is there?"}]}
PROMPT = "It is a truth"
COMMON: dict[str, Any] = {"max_tokens": 4, "seed": 1, "return_token_ids": True}


def chat(server: ServerProcess, **fields: Any) -> Any:
    return server.http.post("/v1/chat/completions", json={**CHAT, **COMMON, **fields})


def complete(server: ServerProcess, **fields: Any) -> Any:
    return server.complete(**{"prompt": PROMPT, **COMMON, **fields})


def test_a_request_names_its_answer(server: ServerProcess) -> None:
    assert complete(server, request_id="mine.1").json()["id"] == "cmpl-mine.1"
    assert chat(server, request_id="mine.2").json()["id"] == "chatcmpl-mine.2"
    for line in complete(server, request_id="mine.3", stream=True).text.splitlines():
        assert line in ("", "data: [DONE]") or json.loads(line.removeprefix("data: "))["id"] == "cmpl-mine.3"
    body = {"prompt": PROMPT, **COMMON, "request_id": "body"}
    answer = server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "header"})
    assert (answer.json()["id"], answer.headers["x-request-id"]) == ("cmpl-header", "header")
    for unfit in ("a b", "a\n", "x" * 129, ""):
        refused = complete(server, request_id=unfit)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id"), unfit
    # the name is no seed and may come again
    answers = [complete(server, request_id="mine.1").json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1] == complete(server).json()["choices"]


def test_a_prompt_is_cut_on_the_side_that_is_named(server: ServerProcess) -> None:
    ids = list(range(5, 305))
    assert complete(server, prompt=ids).status_code == 400
    for fields, kept in [
        ({"truncate_prompt_tokens": 7}, ids[-7:]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "left"}, ids[-7:]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, ids[:7]),
        ({"truncate_prompt_tokens": -1}, ids[-252:]),
        ({"truncate_prompt_tokens": -1, "truncation_side": "right"}, ids[:252]),
    ]:
        answer = complete(server, prompt=ids, **fields).json()
        assert answer["choices"][0]["prompt_token_ids"] == kept
        assert answer["usage"]["prompt_tokens"] == len(kept)
        assert answer["choices"][0]["token_ids"] == complete(server, prompt=kept).json()["choices"][0]["token_ids"]
    whole = chat(server).json()["prompt_token_ids"]
    assert chat(server, truncate_prompt_tokens=5).json()["prompt_token_ids"] == whole[-5:]
    assert chat(server, truncate_prompt_tokens=5, truncation_side="right").json()["prompt_token_ids"] == whole[:5]
    for name, value in [("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", 257), ("truncation_side", "middle")]:
        refused = complete(server, **{name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_are_listed_are_told_instead_of_the_best(server: ServerProcess, stream: bool) -> None:
    """With the sampled one, also where no log-probabilities were requested, and however improbable they are."""
    listed = [700, 3]

    def found(answer: Any, part: str) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        bodies = [json.loads(line) for line in lines if line != "[DONE]"] if stream else [answer.json()]
        rows = [choice["logprobs"] for body in bodies for choice in body["choices"] if choice.get("logprobs")]
        return [row for each in rows for row in each[part]]

    fields = {"logprob_token_ids": listed, "return_tokens_as_token_ids": True, "stream": stream}
    every = complete(server, return_tokens_as_token_ids=True, logprobs=20).json()["choices"][0]
    for more in ({}, {"logprobs": 2}):
        rows = found(complete(server, **fields, **more), "top_logprobs")
        assert len(rows) == COMMON["max_tokens"]
        for token_id, row in zip(every["token_ids"], rows, strict=True):
            assert set(row) == {f"token_id:{each}" for each in (token_id, *listed)}

    for more in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}):
        rows = found(chat(server, **fields, **more), "content")
        assert len(rows) == COMMON["max_tokens"]
        for row in rows:
            assert {entry["token"] for entry in row["top_logprobs"]} == {row["token"], "token_id:700", "token_id:3"}
            values = [entry["logprob"] for entry in row["top_logprobs"]]
            assert values == sorted(values, reverse=True)
    for unfit in ({"logprob_token_ids": [4096]}, {"logprob_token_ids": listed, "echo": True, "max_tokens": 0}):
        refused = complete(server, **unfit)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprob_token_ids")


def test_candidates_of_a_prompt_are_scored(server: ServerProcess) -> None:
    """As an array in NumPy's file format; each has the bits of the prompt's own log-probabilities."""
    ids = complete(server).json()["choices"][0]["prompt_token_ids"]
    own = complete(server, prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"]
    rows = [[token_id, -1] for token_id in ids[2:]]
    for prompt in (PROMPT, [ids, ids]):
        answer = complete(server, prompt=prompt, prompt_logprob_token_ids=rows, prompt_logprob_start=1).json()
        for choice in answer["choices"]:
            found = np.load(io.BytesIO(base64.b64decode(choice["prompt_token_id_logprobs"])))
            assert (found.dtype, found.shape) == (np.float32, (len(ids) - 2, 2))
            logprobs = [row[str(token_id)]["logprob"] for row, token_id in zip(own[2:], ids[2:], strict=True)]
            assert found[:, 0].tolist() == np.array(logprobs, np.float32).tolist()
            assert np.isneginf(found[:, 1]).all()
    asked = chat(server).json()["prompt_token_ids"]
    answer = chat(server, prompt_logprob_token_ids=[[3]], prompt_logprob_start=len(asked) - 2).json()
    assert np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"]))).shape == (1, 1)
    for more in ({"stream": True}, {}, {"prompt_logprob_start": 2, "use_beam_search": True}):
        refused = complete(server, prompt_logprob_token_ids=rows, **more)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprob_token_ids"), more


def test_four_stop_strings_and_no_more(server: ServerProcess) -> None:
    """OpenAI's limit, and vLLM's over HTTP; no string is left out of the four."""
    text = complete(server, max_tokens=12, ignore_eos=True).json()["choices"][0]["text"]
    wanted = text[4:6]
    for place in range(4):
        stop = ["\x01", "\x02", "\x03"]
        stop.insert(place, wanted)
        choice = complete(server, max_tokens=12, ignore_eos=True, stop=stop).json()["choices"][0]
        assert (choice["stop_reason"], choice["text"]) == (wanted, text[: text.index(wanted)])
    for ask in (chat, complete):
        refused = ask(server, stop=["\x01", "\x02", "\x03", "\x04", "\x05"])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop")
        assert ask(server, stop=["\x01", "\x02", "\x03", "\x04"]).status_code == 200


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_may_come_in_larger_chunks(server: ServerProcess, ask: Any) -> None:
    """The first at once; the same tokens in all."""

    def pieces(**fields: Any) -> list[list[int]]:
        chunks = events(ask(server, stream=True, max_tokens=8, ignore_eos=True, **fields))
        found = [choice.get("token_ids") or [] for chunk in chunks for choice in chunk["choices"]]
        return [piece for piece in found if piece]

    alone = pieces()
    larger = pieces(stream_interval=5)
    # under load a chunk may hold more
    assert all(len(piece) >= 5 for piece in larger[1:-1])
    assert len(larger) <= 3
    assert [*chain(*larger)] == [*chain(*alone)]
    assert ask(server, stream_interval=5).json()["choices"] == ask(server).json()["choices"]
    refused = ask(server, stream_interval=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream_interval")


def test_thinking_ends_with_its_budget(server: ServerProcess) -> None:
    end = server.http.post("/tokenize", json={"prompt": "</think>"}).json()["tokens"]
    fields: dict[str, Any] = {"prompt": "Think.<think>\n", "max_tokens": 9 + len(end), "ignore_eos": True}
    free = complete(server, **fields).json()["choices"][0]["token_ids"]
    for budget in (0, 3, 9):
        bound = complete(server, **fields, thinking_token_budget=budget).json()["choices"][0]["token_ids"]
        assert bound[:budget] == free[:budget]
        assert bound[budget : budget + len(end)] == end
    thinking = {"role": "assistant", "content": "<think>"}
    more = {"messages": [*CHAT["messages"], thinking], "add_generation_prompt": False, "continue_final_message": True}
    answer = chat(server, **more, max_tokens=3 + len(end), thinking_token_budget=3, ignore_eos=True).json()
    assert answer["choices"][0]["token_ids"][3:] == end
    assert complete(server, **fields, thinking_token_budget=-1).json()["choices"][0]["token_ids"] == free
    refused = complete(server, thinking_token_budget=-2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "thinking_token_budget")


# What platforms ask


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_ping(server: ServerProcess, method: str) -> None:
    answer = server.http.request(method, "/ping")
    assert (answer.status_code, answer.json()["status"]) == (200, "healthy")


def test_invocations_are_completions_or_chats(server: ServerProcess) -> None:
    completion = {"prompt": PROMPT, **COMMON}
    conversation = {**CHAT, **COMMON}
    for body, path in [(completion, "/v1/completions"), (conversation, "/v1/chat/completions")]:
        named = server.http.post(path, json=body).json()
        invoked = server.http.post("/invocations", json=body)
        assert invoked.status_code == 200
        assert (invoked.json()["object"], invoked.json()["choices"]) == (named["object"], named["choices"])
        streamed = server.http.post("/invocations", json={**body, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.text.endswith("data: [DONE]\n\n")
        refused = server.http.post("/invocations", json={**body, "top_p": 7})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_p")
    for body in ({}, {"text": "a"}, [], "prompt"):
        assert server.http.post("/invocations", json=body).status_code == 400
    headers = {"Content-Type": "application/json"}
    assert server.http.post("/invocations", content=b'{"prompt":', headers=headers).status_code == 400
    assert server.http.post("/invocations", content=b'{"prompt":' + b"[" * 10**5, headers=headers).status_code == 400
    assert server.http.post("/invocations", content=b" " * 9_000_000, headers=headers).status_code == 413


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/invocations"])
def test_an_answer_tells_a_load_balancer_how_busy_the_server_is(server: ServerProcess, path: str) -> None:
    body = {**(CHAT if "chat" in path else {"prompt": PROMPT}), **COMMON}

    def told(kind: str | None) -> str | None:
        headers = {} if kind is None else {"endpoint-load-metrics-format": kind}
        answer = server.http.post(path, json=body, headers=headers)
        assert answer.status_code == 200
        found: str | None = answer.headers.get("endpoint-load-metrics")
        return found

    server.wait_until_idle()
    assert told(None) is told("XML") is None
    for kind in ("TEXT", "text"):
        text = told(kind)
        assert text is not None
        assert text.startswith("TEXT named_metrics.kv_cache_usage_perc=")
        assert text.endswith(", named_metrics.num_requests_waiting=0.0")
    for kind in ("JSON", "json"):
        text = told(kind)
        assert text is not None
        assert text.startswith("JSON ")
        named = json.loads(text.removeprefix("JSON "))["named_metrics"]
        assert set(named) == {"kv_cache_usage_perc", "num_requests_waiting"}
        assert 0 <= named["kv_cache_usage_perc"] <= 1


def test_requests_being_answered_are_counted(server: ServerProcess) -> None:
    server.wait_until_idle()
    assert server.load()["server_load"] == 0
    body = {"prompt": [PROMPT] * 8, "n": 4, "max_tokens": 240, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        # an iterator that nobody holds would end the connection
        lines = answer.iter_lines()
        next(lines)
        load = server.load()
    # one request, of many sequences
    assert (load["server_load"], load["num_sequences"]) == (1, 32)
    server.wait_until_idle()
    assert server.load()["server_load"] == 0


# What vLLM's clients meet


def events(answer: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_the_first_chunk_of_a_chat_has_the_prompts_ids_and_no_other(server: ServerProcess) -> None:
    first, *rest = events(chat(server, stream=True, n=2))
    assert first["prompt_token_ids"] == chat(server).json()["prompt_token_ids"]
    assert rest
    assert not any("prompt_token_ids" in chunk for chunk in rest)
    assert not any("prompt_token_ids" in chunk for chunk in events(chat(server, stream=True, return_token_ids=False)))


@pytest.mark.parametrize("ask", [chat, complete])
def test_usage_all_along_needs_usage_at_all(server: ServerProcess, ask: Any) -> None:
    def told(**options: bool) -> list[bool]:
        return [bool(chunk.get("usage")) for chunk in events(ask(server, stream=True, stream_options=options))]

    assert not any(told(include_usage=False, continuous_usage_stats=True))
    assert all(told(include_usage=True, continuous_usage_stats=True))
    assert told(include_usage=True, continuous_usage_stats=False).count(True) == 1


def test_texts_may_be_numbers_and_flags(server: ServerProcess) -> None:
    plain = chat(server, temperature=0.5, logprobs=True, top_logprobs=2).json()["choices"]
    texts = {"max_tokens": "4", "seed": "1", "temperature": "0.5", "logprobs": "true", "top_logprobs": "2"}
    assert chat(server, **texts).json()["choices"] == plain
    for name, value in (("max_tokens", "four"), ("logprobs", "yes please"), ("temperature", "1e3"), ("seed", "1.5")):
        assert (chat(server, **{name: value}).json()["error"]["param"]) == name
    # where a text is wanted it is one
    assert complete(server, prompt=["5", "6"]).json()["choices"][0]["prompt_token_ids"] != [5]


def test_every_key_of_a_bias_that_is_none_is_named(server: ServerProcess) -> None:
    message = chat(server, logit_bias={"bad1": 1, "5": 1, "bad2": 1}).json()["error"]["message"]
    assert message == "logit_bias keys must be token ids, got 'bad1', 'bad2'."


def test_no_tools_are_none(server: ServerProcess) -> None:
    assert chat(server, tools=[]).json()["choices"] == chat(server).json()["choices"]
    assert chat(server, tools=[], tool_choice="required").json()["error"]["param"] == "tool_choice"


def _fields_of(model: Any) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(model)] + list(NEUTRAL[model])


@pytest.mark.parametrize(
    ("path", "model", "base"),
    [
        ("/v1/chat/completions", ChatCompletionRequest, CHAT | {"max_tokens": 2}),
        ("/v1/completions", CompletionRequest, {"prompt": PROMPT, "max_tokens": 2}),
        ("/v1/responses", ResponsesRequest, {"input": PROMPT, "max_output_tokens": 2}),
        ("/v1/messages", MessagesRequest, CHAT | {"max_tokens": 2}),
        ("/tokenize", TokenizeRequest, {"prompt": PROMPT}),
        ("/detokenize", DetokenizeRequest, {"tokens": [5]}),
    ],
)
def test_integers_of_more_than_64_bits_are_taken_or_refused(
    server: ServerProcess, path: str, model: Any, base: dict[str, Any]
) -> None:
    huge = 2**70
    values = (
        huge,
        -huge,
        2**64,
        1e300,
        [huge],
        {"5": huge},
        {str(huge): 1},
        [{"role": "user", "content": "x", "a": huge}],
    )
    for name in _fields_of(model):
        for value in values:
            answer = server.http.post(path, json={**base, name: value})
            assert answer.status_code in (200, 400), (name, value, answer.text)
