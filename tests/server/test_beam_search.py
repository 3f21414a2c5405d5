"""`use_beam_search` over HTTP, against the search in Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_process import ServerProcess

from sempre.engine import LLM, BeamSearchParams

PROMPTS = ["It is a truth", "The whale"]
BODY: dict[str, Any] = {"prompt": PROMPTS, "n": 3, "max_tokens": 6, "use_beam_search": True}


def ask(server: ServerProcess, **fields: Any) -> Any:
    answer = server.http.post("/v1/completions", json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_choices_are_the_beams(server: ServerProcess) -> None:
    answer = ask(server, return_token_ids=True, logprobs=2)
    with LLM("tiny", max_model_len=256, num_threads=1, seed=11) as llm:
        outputs = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=6))
        prompt_ids = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    beams = [
        (each.tokens[len(ids) :], each) for ids, output in zip(prompt_ids, outputs, strict=True)
        for each in output.sequences
    ]  # fmt: skip
    for choice, (token_ids, beam) in zip(answer["choices"], beams, strict=True):
        assert choice["token_ids"] == token_ids
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs == [row[token].logprob for token, row in zip(token_ids, beam.logprobs, strict=False)]
        assert all(2 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])
        assert choice["finish_reason"] == beam.finish_reason
    assert answer["usage"]["completion_tokens"] == sum(len(token_ids) for token_ids, _ in beams)


def test_a_stream_tells_the_same_at_the_end(server: ServerProcess) -> None:
    whole = ask(server)
    lines = server.http.post("/v1/completions", json={**BODY, "stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    choices = [choice for line in lines[:-2] for choice in json.loads(line.removeprefix("data: "))["choices"]]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]
    ]


def test_a_conversation(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Who?"}], "n": 2, "max_tokens": 5, "use_beam_search": True}
    answers = [server.http.post("/v1/chat/completions", json=body | {"seed": seed}).json() for seed in (1, 2)]
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 2
    lines = server.http.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    choices = [choice for line in lines[:-2] for choice in json.loads(line.removeprefix("data: "))["choices"]]
    streamed = ["".join(c["delta"].get("content") or "" for c in choices if c["index"] == i) for i in range(2)]
    assert streamed == texts[0]
    assert [c["index"] for c in choices if "role" in c["delta"]] == [0, 1]


def test_empty_lists_of_what_a_search_does_not_honour_pass(server: ServerProcess) -> None:
    assert ask(server, logit_bias={}, stop=[], bad_words=[], stop_token_ids=[])["choices"] == ask(server)["choices"]


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"stop": ["x"]}, "stop"),
        ({"top_p": 0.5}, "top_p"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"length_penalty": 99.0}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 0.5}, "length_penalty"),
        ({"n": 11}, "beam_width"),
    ],
)
def test_what_a_search_does_not_honour_is_refused(
    server: ServerProcess, fields: dict[str, Any], parameter: str
) -> None:
    answer = server.http.post("/v1/completions", json={**BODY, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, parameter), answer.text
    assert ask(server, max_tokens=1)["choices"]


def test_a_client_that_leaves_ends_its_search(server: ServerProcess) -> None:
    with server.http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 200, "stream": True}):
        pass
    server.wait_until_idle()
    assert ask(server, max_tokens=1)["choices"]
