"""`sempre complete` and `sempre chat --url`."""

from __future__ import annotations

import io
import itertools
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_http import Answer, events, refusal, scripted_server, text_chunk

from sempre.engine.cli.main import main
from sempre.engine.cli.remote.answers import STREAMED, RemoteChat
from sempre.engine.cli.remote.connection import EventSplitter, Server, base_url
from sempre.ipc.errors import ServerError

STREAM = events(
    text_chunk("Grüß "), text_chunk("dich\n\ndata: x", system_fingerprint="f"), {"choices": [], "usage": None}
)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    written = capsys.readouterr()
    return code, written.out, written.err


def type_lines(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8), crlf=st.booleans())
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int], crlf: bool) -> None:
    whole = b": comment\nid: 3\n" + (STREAM.replace(b"\n", b"\r\n") if crlf else STREAM)
    splitter = EventSplitter()
    places = [0, *sorted(cuts), len(whole)]
    found = [event for a, b in itertools.pairwise(places) for event in splitter.feed(whole[a:b])]
    assert found == EventSplitter().feed(whole)
    assert len(found) == 4
    assert found[-1] == b"[DONE]"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_completion_in_pieces(capsys: pytest.CaptureFixture[str], size: int) -> None:
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    with scripted_server(lambda path, body: Answer(pieces=pieces)) as server:
        flags = ["--sampling-seed", "5", "--stop", "a", "--max-tokens", "9"]
        code, out, err = run(capsys, "complete", "--url", f"{server.url}/v1", "-q", "x", "--api-key", "k", *flags)
    assert (code, out, err) == (0, "Grüß dich\n\ndata: x\n", "")
    assert server.bodies == [
        {"model": "scripted", **STREAMED, "seed": 5, "stop": ["a"], "max_tokens": 9, "prompt": "x"}
    ]
    assert server.headers[0]["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (refusal("too hot", 400), 1, "sempre: error: too hot (status 400)\n"),
        (Answer(401, [b"no"]), 1, "sempre: error: no (status 401)\n"),
        (refusal("busy", 503), 1, "sempre: error: {url}: busy (status 503)\n"),
        (
            Answer(pieces=[events(text_chunk("a"), done=False)]),
            1,
            "sempre: error: {url} ended the response too early\n",
        ),
        (
            Answer(pieces=[events(text_chunk("a"), {"error": {"message": "lost", "code": 500}})]),
            1,
            "sempre: error: {url}: lost (status 500)\n",
        ),
        (
            Answer(pieces=[b"data: {nonsense\n\n"]),
            1,
            "sempre: error: {url} sent an event that is not a JSON object: b'{nonsense'\n",
        ),
    ],
)
def test_failures_are_one_line(capsys: pytest.CaptureFixture[str], answer: Answer, code: int, message: str) -> None:
    with scripted_server(lambda path, body: answer) as server:
        found, _, err = run(capsys, "complete", "--url", server.url, "-q", "x")
    assert (found, err) == (code, message.replace("{url}", server.url))


def test_a_connection_that_is_cut_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    cut = Answer(pieces=[events(text_chunk("a"), done=False)], cut=True)
    with scripted_server(lambda path, body: cut) as server:
        code, out, err = run(capsys, "complete", "--url", server.url, "-q", "x")
    assert (code, out) == (1, "a")
    assert err.startswith(f"sempre: error: the connection to {server.url} failed: ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["complete", "-q", "x"], 2, "--url is missing, for example --url http://127.0.0.1:8000"),
        (["complete", "--url", "localhost:8000", "-q", "x"], 2, "--url must begin with http:// or https://"),
        (["complete", "--url", "http://127.0.0.1:1", "-q", "x"], 1, "no server answers at http://127.0.0.1:1"),
        (
            ["chat", "--url", "http://127.0.0.1:1", "--max-num-seqs", "3"],
            2,
            "--max-num-seqs: set these when you start the server",
        ),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"sempre: error: {message}")


def test_an_unknown_model_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(lambda path, body: Answer()) as server:
        code, _, err = run(capsys, "complete", "--url", server.url, "--model", "other", "-q", "x")
    assert (code, err) == (2, f"sempre: error: {server.url} does not serve 'other'; it serves scripted\n")


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    monkeypatch.setenv("SEMPRE_API_KEY", "first")
    with scripted_server(lambda path, body: Answer(pieces=[STREAM])) as script, Server(script.url) as server:
        list(server.stream("/v1/completions", {}))
    assert script.headers[0]["authorization"] == "Bearer first"
    assert base_url("http://x:1/v1/") == "http://x:1"


def test_a_refused_message_is_left_out_of_the_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(path: str, body: dict[str, Any]) -> Answer:
        if body["messages"][-1]["content"] == "bad":
            return refusal("no", 400)
        return Answer(pieces=[events({"choices": [{"delta": {"role": "assistant", "content": "yes"}}]})])

    type_lines(monkeypatch, "one\nbad\ntwo\n")
    with scripted_server(script) as server:
        code, out, err = run(capsys, "chat", "--url", server.url, "--system", "s")
    assert (code, out, err) == (0, "yes\nyes\n", "sempre: error: no (status 400)\n")
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["s", "one", "yes", "two"]


def test_a_chat_waits_for_a_server_that_is_gone_for_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        refusal("starting", 503),
        Answer(cut=True),
        Answer(pieces=[events({"choices": [{"delta": {"content": "yes"}, "seed": 3}], "system_fingerprint": "f"})]),
        Answer(pieces=[events({"choices": [{"delta": {"content": "no"}}]}, done=False)], cut=True),
    ]
    script = iter(answers)
    with scripted_server(lambda path, body: next(script)) as scripted, Server(scripted.url) as server:
        chat = RemoteChat(server, None, waits=True)
        messages = [{"role": "user", "content": "x"}]
        assert [piece[:3] for piece in chat.pieces(messages, {"seed": 3})] == [("yes", 3, "f")]
        assert scripted.bodies[0] == scripted.bodies[1] == scripted.bodies[2]
        # once an answer has begun, it is not asked for again
        with pytest.raises(ServerError):
            list(chat.pieces(messages, {"seed": 3}))
        assert len(scripted.bodies) == len(answers)
    assert capsys.readouterr().err.count("asking again, Ctrl-C stops") == 1


def test_completions_of_a_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server_url: str
) -> None:
    flags = ["--url", server_url, "--sampling-seed", "3", "--max-tokens", "12"]
    body = {"prompt": "The ship", "seed": 3, "max_tokens": 12}
    expected = httpx.post(f"{server_url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert run(capsys, "complete", *flags, "-q", "The ship") == (0, f"{expected}\n", "")
    type_lines(monkeypatch, "The ship\n\nThe ship\n")
    assert run(capsys, "complete", *flags) == (0, f"{expected}\n{expected}\n", "")


def test_a_chat_with_a_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server_url: str
) -> None:
    def answer(*contents: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        body = {"messages": messages, "temperature": 0, "max_tokens": 6}
        text: str = httpx.post(f"{server_url}/v1/chat/completions", json=body).json()["choices"][0]["message"][
            "content"
        ]
        return text

    first = answer("Hello")
    second = answer("Hello", first, "And you?")
    flags = ["--url", server_url, "--temperature", "0", "--max-tokens", "6"]
    type_lines(monkeypatch, "Hello\nAnd you?\n/reset\nHello\n/exit\nunread\n")
    assert run(capsys, "chat", *flags) == (0, f"{first}\n{second}\n{first}\n", "")
    assert run(capsys, "chat", *flags, "-q", "Hello") == (0, f"{first}\n", "")
