"""What clients of OpenAI's and vLLM's interface see, against a real server process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import ServerProcess

from sempre.engine import LLM, SamplingParams
from sempre.engine.cli.main import main
from sempre.engine.server import activity

PROMPT = "It is a truth"
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "num_threads": 1, "seed": 3}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS) as made:
        yield made


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_that_of_the_python_interface(server: ServerProcess, llm: LLM) -> None:
    """Axis A12: the same tokens and, bit for bit, the same log-probabilities."""
    params = SamplingParams(max_tokens=12, seed=5, temperature=0.8, logprobs=3)
    [expected] = llm.generate(PROMPT, params)
    body = server.complete(
        prompt=PROMPT, max_tokens=12, seed=5, temperature=0.8, logprobs=3, return_token_ids=True
    ).json()
    [choice] = body["choices"]
    output = expected.outputs[0]
    assert (choice["text"], choice["token_ids"]) == (output.text, output.token_ids)
    assert output.logprobs is not None
    own = [row[token_id].logprob for token_id, row in zip(output.token_ids, output.logprobs, strict=True)]
    assert choice["logprobs"]["token_logprobs"] == own
    tops = choice["logprobs"]["top_logprobs"]
    assert [list(top.values()) for top in tops] == [[e.logprob for e in row.values()] for row in output.logprobs]
    assert (choice["seed"], body["system_fingerprint"]) == (5, expected.fingerprint)
    other = server.complete(prompt=PROMPT, max_tokens=12, seed=6, temperature=0.8, return_token_ids=True).json()
    assert other["choices"][0]["token_ids"] != output.token_ids


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(server: ServerProcess, n: int) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, "The ship"], "max_tokens": 10, "seed": 7, "n": n, "logprobs": 1}
    fields["return_token_ids"] = True
    whole = server.complete(**fields).json()
    chunks = events(server.complete(**fields, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["choices"] == []
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None}
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {whole["system_fingerprint"]}
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        for name in choice["logprobs"]:
            assert [x for part in parts for x in part["logprobs"][name]] == choice["logprobs"][name]
        assert {part["seed"] for part in parts} == {choice["seed"]} == {7 + choice["index"] % n}
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert [choice["index"] for choice in whole["choices"]] == list(range(2 * n))


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_a_stream_of_text_alone_adds_up_to_the_whole(server: ServerProcess, endpoint: str) -> None:
    """Every choice with its own index, seed and text, though only the text of an event is encoded again."""
    fields: dict[str, Any] = {"max_tokens": 10, "seed": 7, "n": 3, "ignore_eos": True}
    if endpoint == "completions":
        fields["prompt"] = [PROMPT, "The ship"]
    else:
        fields["messages"] = [{"role": "user", "content": "Who is there?"}]
    whole = server.http.post(f"/v1/{endpoint}", json=fields).json()["choices"]
    chunks = events(server.http.post(f"/v1/{endpoint}", json={**fields, "stream": True}).text)
    assert not any("usage" in chunk for chunk in chunks)
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        if endpoint == "completions":
            assert "".join(part["text"] for part in parts) == choice["text"]
        else:
            assert "".join(part["delta"].get("content") or "" for part in parts) == choice["message"]["content"]
        assert {part["seed"] for part in parts} == {choice["seed"]} == {7 + choice["index"] % 3}
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_a_stream_may_tell_its_usage_all_along(server: ServerProcess, endpoint: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 6, "seed": 7, "ignore_eos": True}
    if endpoint == "completions":
        fields["prompt"] = PROMPT
    else:
        fields["messages"] = [{"role": "user", "content": "Who is there?"}]
    whole = server.http.post(f"/v1/{endpoint}", json=fields).json()["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = server.http.post(f"/v1/{endpoint}", json={**fields, "stream": True, "stream_options": options})
    chunks = [
        chunk for chunk in events(answer.text) if not any(c.get("delta", {}).get("role") for c in chunk["choices"])
    ]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0] > 0, counts[-2], counts[-1]) == (True, 6, 6)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {whole["prompt_tokens"]}


def cached_tokens(server: ServerProcess, **fields: Any) -> int:
    found: int = server.complete(max_tokens=1, **fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_cached_tokens_of_all_prompts_are_counted_and_salts_share_none(server: ServerProcess) -> None:
    prompts = [[11, *[5] * 40], [12, *[5] * 40]]
    assert cached_tokens(server, prompt=prompts) == 0
    assert cached_tokens(server, prompt=prompts) == 2 * 32
    assert cached_tokens(server, prompt=prompts[0], cache_salt="mine") == 0
    assert cached_tokens(server, prompt=prompts[0], cache_salt="mine") == 32
    assert cached_tokens(server, prompt=prompts[0], cache_salt="yours") == 0

    def chat(**more: Any) -> int:
        messages = [{"role": "user", "content": "of salts and caches " * 4}]
        answer = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1, **more}).json()
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert chat() == 0
    assert chat() > 0
    assert chat(cache_salt="mine") == 0


def test_a_chat_without_a_limit_ends_with_the_context(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True, "seed": 1}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == SETTINGS["max_model_len"]


def test_a_chat_may_begin_with_the_text_that_it_goes_on_from(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is I,"}]
    body = {"messages": messages, "max_tokens": 6, "seed": 1, "ignore_eos": True}
    body |= {"add_generation_prompt": False, "continue_final_message": True}

    def content(**more: Any) -> str:
        answer = server.http.post("/v1/chat/completions", json={**body, **more})
        if "stream" not in more:
            return str(answer.json()["choices"][0]["message"]["content"])
        return "".join(c["delta"].get("content") or "" for chunk in events(answer.text) for c in chunk["choices"])

    assert content(echo=True) == content(echo=True, stream=True) == "It is I," + content()


def test_tokens_may_be_named_by_their_ids(server: ServerProcess) -> None:
    common: dict[str, Any] = {"max_tokens": 3, "seed": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    done = server.complete(prompt=PROMPT, logprobs=0, **common).json()["choices"][0]
    assert done["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in done["token_ids"]]
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, **common}
    answer = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    names = [entry["token"] for entry in answer["logprobs"]["content"]]
    assert names == [f"token_id:{token_id}" for token_id in answer["token_ids"]]


def test_a_sibling_is_a_lone_request_with_its_seed(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 10, "return_token_ids": True}
    siblings = server.complete(**fields, seed=20, n=3).json()["choices"]
    lone = server.complete(**fields, seed=22).json()["choices"][0]
    assert siblings[2]["token_ids"] == lone["token_ids"]
    assert siblings[1]["token_ids"] != lone["token_ids"]


def test_unseeded_requests_have_the_seeds_of_the_python_interface(server: ServerProcess, llm: LLM) -> None:
    """Axis A19: a server and an LLM with one engine seed, and other requests before and between."""
    prompts = ["The first of two that nobody else asks", "The second of them"]
    params = SamplingParams(max_tokens=4, temperature=0.8)
    expected = [[o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)] for _ in range(2)]
    found = []
    for order in (1, -1):
        answers = {}
        for prompt in prompts[::order]:
            body = {"prompt": prompt, "max_tokens": 4, "temperature": 0.8, "return_token_ids": True}
            [answers[prompt]] = server.complete(**body).json()["choices"]
            server.complete(prompt="another one", max_tokens=1)
        found.append([answers[prompt] for prompt in prompts])
    assert [[(c["seed"], c["token_ids"]) for c in choices] for choices in found] == [
        [(o.seed, o.token_ids) for o in outputs] for outputs in expected
    ]
    assert len({choice["seed"] for choices in found for choice in choices}) == 4


def test_an_unseeded_answer_can_be_repeated_by_its_seed(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 10, "return_token_ids": True, "logprobs": 0}
    first = server.complete(**fields).json()["choices"][0]
    again = server.complete(**fields, seed=first["seed"]).json()["choices"][0]
    assert again == first
    assert server.complete(**fields).json()["choices"][0]["seed"] != first["seed"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_does_not_double_the_character_that_a_prompt_ends_inside(
    server: ServerProcess, llm: LLM, stream: bool
) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("Hello 🌶")
    assert tokenizer.token_text(ids[-2]) == "\ufffd"
    prompt, rest = ids[:-1], ids[-1]
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "allowed_token_ids": [rest], "echo": True}
    fields["logprobs"] = 1
    answer = server.complete(**fields, stream=stream)
    choices = [c for e in (events(answer.text) if stream else [answer.json()]) for c in e["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Hello 🌶"
    tokens = [name for choice in choices for name in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert tokens[-1].startswith("bytes:\\x")
    assert offsets[-1] == len("Hello ")
    alone = server.complete(prompt=prompt, max_tokens=0, echo=True).json()["choices"][0]["text"]
    assert alone == tokenizer.decode(prompt)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_is_a_stop_string_though_it_is_hidden(
    server: ServerProcess, llm: LLM, stream: bool, include: bool
) -> None:
    """After freely sampled text, and across tokens: the end of the text and the special token."""
    end = llm.get_tokenizer().encode("<|im_end|>")
    fields: dict[str, Any] = {"prompt": PROMPT, "allowed_token_ids": end, "max_tokens": 4, "ignore_eos": True}
    fields |= {"stop": ["<|im_end|><|im_end|>"], "include_stop_str_in_output": include, "return_token_ids": True}
    answer = server.complete(**fields, stream=stream)
    choices = [c for e in (events(answer.text) if stream else [answer.json()]) for c in e["choices"]]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == end * 2
    assert "".join(choice["text"] for choice in choices) == ("<|im_end|><|im_end|>" if include else "")
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "<|im_end|><|im_end|>")


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_token_ids_shows_special_tokens(server: ServerProcess, llm: LLM, stream: bool) -> None:
    """As the echo of a text does; those of the output stay hidden."""
    text = "<|im_start|>user\nHi<|im_end|>\n"
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    end = llm.get_tokenizer().encode("<|im_end|>", add_special_tokens=False)
    for prompt in (ids, text):
        fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 2, "allowed_token_ids": end, "ignore_eos": True}
        answer = server.complete(**fields, echo=True, logprobs=0, add_special_tokens=False, stream=stream)
        choices = [c for e in (events(answer.text) if stream else [answer.json()]) for c in e["choices"]]
        assert "".join(choice["text"] for choice in choices) == text
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        tokens = [name for choice in choices for name in choice["logprobs"]["tokens"]]
        assert offsets == [len("".join(tokens[:place])) for place in range(len(ids))] + [len(text)] * 2
    alone = server.complete(prompt=ids, max_tokens=0, echo=True).json()
    assert alone["choices"][0]["text"] == text


def test_echo_scores_the_prompt(server: ServerProcess, llm: LLM) -> None:
    """What evaluation harnesses read: the log-probability of every prompt token after the first."""
    body = server.complete(prompt=PROMPT, max_tokens=1, echo=True, logprobs=1, temperature=0).json()
    [choice] = body["choices"]
    [score] = llm.score(PROMPT)
    assert choice["text"].startswith(PROMPT)
    assert choice["logprobs"]["token_logprobs"][:-1] == score.logprobs
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    alone = server.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, temperature=0).json()
    assert alone["choices"][0]["text"] == PROMPT
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == score.logprobs
    assert alone["usage"]["completion_tokens"] == 0
    options = {"include_usage": True}
    answer = server.complete(prompt=PROMPT, max_tokens=0, echo=True, stream=True, stream_options=options)
    *parts, last = events(answer.text)
    assert "".join(part["choices"][0]["text"] for part in parts) == PROMPT
    assert last["usage"] == {**alone["usage"], "prompt_tokens_details": last["usage"]["prompt_tokens_details"]}


def test_prompt_logprobs(server: ServerProcess, llm: LLM) -> None:
    choice = server.complete(prompt=PROMPT, max_tokens=1, prompt_logprobs=1, seed=1).json()["choices"][0]
    [score] = llm.score(PROMPT)
    assert choice["prompt_logprobs"][0] is None
    ids = score.token_ids[1:]
    found = [row[str(token)]["logprob"] for token, row in zip(ids, choice["prompt_logprobs"][1:], strict=True)]
    assert found == score.logprobs[1:]


def test_an_answer_with_too_many_log_probabilities_is_refused_at_once(server: ServerProcess) -> None:
    answer = server.complete(prompt=[[5 + i] * 240 for i in range(110)], prompt_logprobs=20, max_tokens=1)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt_logprobs"
    assert "at least 552090 log-probabilities, and at most 524288" in error["message"]
    assert not server.load()["num_sequences"]


def test_sampling_fields_reach_the_engine(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "seed": 1, "return_token_ids": True}
    assert server.complete(**fields, logit_bias={"300": 100}).json()["choices"][0]["token_ids"] == [300] * 8
    allowed = server.complete(**fields, allowed_token_ids=[301, 302]).json()["choices"][0]
    assert set(allowed["token_ids"]) <= {301, 302}
    plain = server.complete(**fields).json()["choices"][0]
    stop = plain["text"][3:5]
    stopped = server.complete(**fields, stop=stop).json()["choices"][0]
    assert stopped["text"] == plain["text"][: plain["text"].index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    late = server.complete(**fields, stop_token_ids=[plain["token_ids"][0]], min_tokens=4).json()["choices"][0]
    assert len(late["token_ids"]) >= 4
    assert server.complete(**fields, cache_salt="a").json()["choices"][0] == plain
    assert server.complete(**{**fields, "prompt": [1, 300, 5]}).status_code == 200


def test_openai_client(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="`a/b` does not exist"):
        client.models.retrieve("a/b")
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, seed=4)
    parts = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, seed=4, stream=True))
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    messages: Any = [{"role": "user", "content": "Who is there?"}]
    common: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 6, "seed": 4}
    answer = client.chat.completions.create(**common, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == answer.choices[0].message.role == "assistant"
    assert chunks[-1].usage is not None
    assert answer.usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert answer.choices[0].model_extra == {"stop_reason": None, "seed": 4, "token_ids": None}
    content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [2] * len(content)
    assert bytes(b for token in content for b in token.bytes or []).decode() == text


def test_async_openai_client(server: ServerProcess) -> None:
    """Sixteen at once, each equal to its lone answer."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:

            async def ask(seed: int) -> str:
                done = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, seed=seed)
                return done.choices[0].text

            together = await asyncio.gather(*(ask(seed) for seed in range(16)))
            assert together == [await ask(seed) for seed in range(16)]
            assert len(set(together)) > 8
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.completions.create(model="other", prompt=PROMPT)

    asyncio.run(run())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown field", {"topp": 1}, "topp"),
    ("nested unknown field", {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ("wrong type", {"max_tokens": "many"}, "max_tokens"),
    ("bool for int", {"n": True}, "n"),
    ("range", {"top_p": 2}, "top_p"),
    ("too many stop strings", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ("empty stop string", {"stop": [""]}, "stop"),
    ("too many logprobs", {"logprobs": 21}, "logprobs"),
    ("n beyond the limit", {"n": 129}, "n"),
    ("greedy with n", {"n": 2, "temperature": 0}, "n"),
    ("stream_options alone", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("prompt_logprobs in a stream", {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ("empty prompt list", {"prompt": []}, "prompt"),
    ("too many prompts", {"prompt": ["a"] * 2049}, "prompt"),
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("mixed prompt", {"prompt": ["a", 1]}, "prompt"),
    ("token out of vocabulary", {"prompt": [10**6]}, "prompt_token_ids"),
    ("too long", {"prompt": [5] * 300}, "prompt"),
    ("priority of the wrong type", {"priority": "high"}, "priority"),
    ("suffix", {"suffix": "end"}, "suffix"),
    ("seed too large", {"seed": 2**64}, "seed"),
    ("structured output of no kind", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("nothing to generate", {"max_tokens": 0}, "max_tokens"),
    ("bias of no token", {"logit_bias": {"x": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("fields", "param"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refusals_name_the_field(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    answer = server.complete(**{"prompt": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
        ({"chat_template": "/etc/passwd"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_chat_refusals(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt":"\\ud800"}', b"[" * 10_000])
def test_bodies_that_are_none(server: ServerProcess, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == 400


def test_other_statuses(server: ServerProcess) -> None:
    assert server.http.get("/nothing").json()["error"]["code"] == 404
    assert server.http.get("/v1/completions").json()["error"]["code"] == 405
    form = server.http.post("/v1/completions", data={"prompt": "a"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, 415)


def test_request_id_is_honoured_and_logged(server: ServerProcess) -> None:
    answer = server.http.post(
        "/v1/completions", json={"prompt": "secret words", "max_tokens": 1}, headers={"X-Request-Id": "my-id.7"}
    )
    assert answer.headers["x-request-id"] == "my-id.7"
    assert answer.json()["id"] == "cmpl-my-id.7"
    evil = server.http.get("/live", headers={"X-Request-Id": "a b<script>"}).headers["x-request-id"]
    assert len(evil) == 32
    lines = [json.loads(line) for line in server.log.splitlines()]
    [line] = [line for line in lines if line.get("request_id") == "my-id.7"]
    assert (line["status"], line["output_tokens"], line["seed"]) == (200, 1, answer.json()["choices"][0]["seed"])
    assert "secret words" not in server.log
    others = [line for line in lines if "request_id" not in line and line["logger"] != activity.__name__]
    assert len(others) <= 10


def test_tokenize_and_back(server: ServerProcess, llm: LLM) -> None:
    done = server.http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert done["tokens"] == llm.get_tokenizer().encode(PROMPT)
    assert done["token_strs"] == llm.get_tokenizer().tokenize(PROMPT)  # as the vocabulary has them
    assert any(token.startswith("Ġ") for token in done["token_strs"])
    assert server.http.post("/detokenize", json={"tokens": done["tokens"]}).json() == {"prompt": PROMPT}
    refused = server.http.post("/detokenize", json={"tokens": [10**6]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    chat: Any = [{"role": "user", "content": "Hi"}]
    tokens = server.http.post("/tokenize", json={"messages": chat}).json()["tokens"]
    assert tokens == llm.render_chat(chat)["prompt_token_ids"]
    info = server.http.get("/tokenizer_info").json()
    assert info["chat_template"] == llm.get_tokenizer().chat_template
    assert (info["tokenizer_class"], info["eos_token"]) == ("PreTrainedTokenizerFast", "<|endoftext|>")
    refused = server.http.post("/tokenize", json={"messages": chat, "chat_template": "{{ messages }}"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")


def test_information(server: ServerProcess, llm: LLM) -> None:
    info = server.http.get("/server_info").json()
    assert info["fingerprint"] == llm.fingerprint
    assert info["fingerprint_parts"] == llm.fingerprint_parts
    assert info["fingerprint_environment"].keys() == llm.fingerprint_environment.keys()
    assert info["engine_config"]["max_num_seqs"] == 8
    assert info["limits"]["max_num_batched_tokens"] == 8 + 240
    assert {"start", "load", "warm_up", "total"} <= info["startup_seconds"].keys()
    assert server.http.get("/health").json()["status"] == "healthy"
    assert [worker["rank"] for worker in server.http.get("/health").json()["workers"]] == [0]


def test_ranks_are_looked_at(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    server.complete(prompt="a", max_tokens=2)
    capsys.readouterr()
    assert main(["debug", "ranks", "--url", server.url]) == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert main(["debug", "ranks", "--url", server.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [rank] = found["ranks"]
    assert (found["state"], found["problems"], rank["role"], rank["stack"]) == ("ready", [], "target", "")
    assert rank["pid"] == server.http.get("/health").json()["workers"][0]["pid"]
    assert "stack" not in server.http.get("/health").text
    assert rank["resident_bytes"] > 2**20
    cells = dict(zip(titles.split(), row.replace(" MiB", "MiB").replace(" s", "s").split(), strict=True))
    assert (cells["rank"], cells["pid"], cells["digest"]) == ("0", str(rank["pid"]), rank["step_digest"])
    assert cells["step"] == str(rank["step_id"])
    assert main(["debug", "ranks"]) == 2
    assert "--url: give the address" in capsys.readouterr().err


def test_metrics_count(server: ServerProcess) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    server.wait_until_idle()
    before = read()
    assert server.complete(prompt=PROMPT, max_tokens=5, ignore_eos=True, n=2, seed=1).status_code == 200
    after = read()
    grown = {name: after[name] - value for name, value in before.items() if after[name] != value}
    assert grown['sempre:generation_tokens_total{engine="0",model_name="tiny"}'] == 10
    assert grown['sempre:request_generation_tokens_sum{model_name="tiny"}'] == 10
    assert grown['sempre:request_generation_tokens_count{model_name="tiny"}'] == 2
    assert grown['sempre:e2e_request_latency_seconds_count{model_name="tiny"}'] == 1
    assert grown['sempre:request_success_total{finished_reason="length",model_name="tiny"}'] == 2
    steps = grown['sempre:iterations_total{engine="0",model_name="tiny"}']
    assert grown['sempre:iteration_tokens_total_count{model_name="tiny"}'] == steps
    assert steps < grown['sempre:iteration_tokens_total_sum{model_name="tiny"}'] <= 10 + 2 * len(PROMPT)
    parts = {}
    for part in ("queue", "prefill", "decode", "inference"):
        assert grown[f'sempre:request_{part}_time_seconds_count{{model_name="tiny"}}'] == 1
        # decoding takes no time as far as a client sees that gets all tokens at once
        parts[part] = grown.get(f'sempre:request_{part}_time_seconds_sum{{model_name="tiny"}}', 0.0)
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["inference"] == pytest.approx(parts["prefill"] + parts["decode"])
    assert any(name.startswith("sempre:cache_config_info{") and 'block_size="16"' in name for name in after)


def test_client_that_leaves_is_aborted(tmp_path: Path) -> None:
    """Streamed and whole, with siblings, running and queued: nothing continues without its client."""

    async def leave(server: ServerProcess) -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            common: dict[str, Any] = {"model": "tiny", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
            stream = await client.completions.create(prompt=PROMPT, stream=True, **common)
            await stream.__anext__()
            whole = [
                asyncio.create_task(client.completions.create(prompt=[PROMPT] * 3, n=2, seed=seed, **common))
                for seed in range(2)
            ]
            while len(server.http.get("/load").json()) and server.load()["num_sequences"] != 13:
                await asyncio.sleep(0.01)
            await stream.close()
            for task in whole:
                task.cancel()
            await asyncio.gather(*whole, return_exceptions=True)

    # requests that run for seconds, so that none has ended before its client leaves
    flags = ("--max-model-len", "2048", "--max-num-seqs", "8", "--num-threads", "1")
    with ServerProcess(tmp_path / "log", *flags) as server:
        asyncio.run(leave(server))
        server.wait_until_idle()
        line = next(x for x in server.http.get("/metrics").text.splitlines() if 'finished_reason="abort"' in x)
        assert float(line.rpartition(" ")[2]) == 13
        assert server.load()["kv_cache_usage_perc"] == [0.0]


def test_a_huge_prompt_holds_nobody_up(server: ServerProcess) -> None:
    """Text and token ids far beyond the context are refused; the log blames nobody for clients that left."""
    text = server.complete(prompt="It is a truth " * 200_000)
    ids = server.complete(prompt=[5] * 1_000_000)
    chat = server.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "It is a truth " * 10_000}]}
    )
    # a million ids are more values than a body may hold, so nobody counts them
    assert ids.status_code == 413
    for answer in (text, chat):
        assert answer.status_code == 400
        assert "maximum context length is" in answer.json()["error"]["message"]
    assert '"level": "ERROR"' not in server.log
