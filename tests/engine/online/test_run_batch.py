"""`sempre run-batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_http import Answer, as_json, refusal, scripted_server

from sempre.engine.cli.arguments import add_engine_flags, engine_keywords
from sempre.engine.cli.main import main
from sempre.engine.cli.parser import CommandParser
from sempre.engine.cli.remote.own_server import as_flags
from sempre.engine.cli.run_batch import read_lines, seeded


def request(custom_id: Any, body: Any, url: str = "/v1/completions", method: str = "POST") -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def answers(folder: Path, lines: list[str], *flags: str) -> tuple[int, list[dict[str, Any]]]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines))
    code = main(["run-batch", "-i", str(source), "-o", str(target), *flags])
    return code, [json.loads(line) for line in target.read_text().splitlines()]


def test_wrong_lines_harm_no_others(tmp_path: Path, server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "The ship", "max_tokens": 6, "seed": 4}
    chat = {"messages": [{"role": "user", "content": "Hé\u2028"}], "max_tokens": 3, "seed": 1}
    lines = [
        request("first", good),
        "",
        "nonsense",
        "[1]",
        request(3, good),
        request("first", good),
        request("get", good, method="GET"),
        request("elsewhere", good, url="http://example.org/"),
        request("no body", "text"),
        request("streamed", {**good, "stream": True}),
        request("refused", {**good, "top_p": 7}),
        request("unknown model", {**good, "model": "gone"}),
        request("chat", chat, url="/v1/chat/completions"),
        request("response", {"input": "Hé", "max_output_tokens": 3, "seed": 1}, url="/v1/responses"),
        request("last", good),
    ]
    code, records = answers(tmp_path, lines, "--url", server_url, "--max-concurrency", "3")
    assert code == 1
    assert "10 of 14 lines failed" in capsys.readouterr().err
    assert [record["custom_id"] for record in records] == [
        *["first", None, None, None, "first", "get", "elsewhere", "no body", "streamed"],
        *["refused", "unknown model", "chat", "response", "last"],
    ]
    assert [record["id"] for record in records] == [f"batch_req_{i}" for i in (1, *range(3, 16))]
    assert [record["response"]["status_code"] for record in records] == [200, *[400] * 9, 404, 200, 200, 200]
    first, last = records[0], records[-1]
    assert first["error"] is None
    assert first["response"]["body"]["choices"] == last["response"]["body"]["choices"]
    assert first["response"]["body"]["choices"][0]["seed"] == 4
    assert records[9]["error"]["error"]["param"] == "top_p"
    for record in records[1:11]:
        assert record["error"]["error"]["message"]
        assert record["response"]["body"] is None


def test_a_server_of_its_own_gives_the_same(tmp_path: Path, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what sets up other servers is not for this one
    monkeypatch.setenv("SEMPRE_API_KEY", "k")
    monkeypatch.setenv("SEMPRE_SSL_KEYFILE", "/nowhere")
    lines = [request(str(i), {"prompt": "The ship", "max_tokens": 6, "seed": i, "logprobs": 2}) for i in range(4)]
    engine = ["--model", "tiny", "--max-model-len", "256", "--num-threads", "1", "--device", "cpu"]
    code, own = answers(tmp_path, lines, *engine)
    assert code == 0
    _, other = answers(tmp_path, lines, "--url", server_url)

    def choices(records: list[dict[str, Any]]) -> list[Any]:
        return [record["response"]["body"]["choices"] for record in records]

    assert choices(own) == choices(other)
    _, changed = answers(tmp_path, [line.replace('"seed": 0', '"seed": 9') for line in lines], "--url", server_url)
    assert choices(changed) != choices(other)


def test_a_batch_without_seeds_has_the_same_answers_in_every_run(tmp_path: Path, server_url: str) -> None:
    """However many lines are under way at once, whatever the server did before, and with lengths apart."""
    bodies = [{"prompt": "The ship", "max_tokens": 6}] * 3 + [{"prompt": "The ship", "max_tokens": 5}] * 2
    lines = [request(str(i), {**body, "temperature": 1.5}) for i, body in enumerate(bodies)]
    lines.append(request("given", {**bodies[0], "temperature": 1.5, "seed": -5}))
    runs = []
    for flags in (["--max-concurrency", "1"], [], []):
        code, records = answers(tmp_path, lines, "--url", server_url, *flags)
        assert code == 0
        runs.append([record["response"]["body"]["choices"][0] for record in records])
    assert runs[0] == runs[1] == runs[2]
    seeds = [choice["seed"] for choice in runs[0]]
    assert len(set(seeds)) == len(lines), "equal lines are samples of their own"
    assert seeds[-1] == -5
    _, turned = answers(tmp_path, lines[::-1], "--url", server_url)
    assert sorted(c["response"]["body"]["choices"][0]["seed"] for c in turned) == sorted(seeds)


def test_the_seed_of_the_engine_is_the_batchs(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    bodies = [{"prompt": "p"}, {"prompt": "p", "seed": None}, {"prompt": "p", "seed": -1}]
    path.write_text("\n".join([*(request(str(i), body) for i, body in enumerate(bodies)), "nonsense"]))
    lines = read_lines(path)
    first, again, other = seeded(lines, 0), seeded(lines, 0), seeded(lines, 1)
    assert first == again
    seeds = [line.body["seed"] for line in [*first[:3], *other[:3]]]
    assert len({*seeds, -1}) == 7, "null and -1 are no seeds"
    assert first[3] == lines[3]


def test_a_line_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(request(str(i), {"prompt": "p"}) for i in range(3)))
    parsed: list[object] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    seeded(read_lines(path), 0)
    assert len(parsed) == 3


def test_settings_survive_being_written_as_flags() -> None:
    parser = CommandParser(prog="x")
    add_engine_flags(parser)
    given = ["--max-model-len", "2k", "--no-enable-prefix-caching", "--dtype", "bfloat16", "--heartbeat-timeout-s", "5"]
    settings = engine_keywords(parser.parse(given))
    assert len(settings) == 4
    assert engine_keywords(parser.parse(as_flags(settings))) == settings


def test_a_server_that_does_not_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = answers(tmp_path, [request("a", {})], "--model", "no-such-model")
    assert (code, records) == (4, [])
    assert "no-such-model" in capsys.readouterr().err


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def script(path: str, body: dict[str, Any]) -> Answer:
        asked.append(body["prompt"])
        busy = asked.count(body["prompt"]) < 3
        return refusal("busy", 503, Retry_After="0") if busy else as_json({"choices": []}, X_Request_Id="r")

    with scripted_server(script) as server:
        code, records = answers(tmp_path, [request("a", {"prompt": "p"})], "--url", server.url)
    assert (code, asked) == (0, ["p", "p", "p"])
    assert records[0]["response"] == {"status_code": 200, "request_id": "r", "body": {"choices": []}}


def test_a_connection_lost_is_its_lines_error(tmp_path: Path) -> None:
    def script(path: str, body: dict[str, Any]) -> Answer:
        return Answer(pieces=[b'{"cho'], cut=True) if body["prompt"] == "cut" else as_json({"choices": []})

    lines = [request(name, {"prompt": name}) for name in ("cut", "fine")]
    with scripted_server(script) as server:
        code, (cut, fine) = answers(tmp_path, lines, "--url", server.url)
    assert code == 1
    assert (cut["response"], cut["error"]["error"]["type"]) == (None, "APIConnectionError")
    assert fine["error"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "x"], "--input-file is missing"),
        (["-i", "x"], "--output-file is missing"),
        (["-i", "x", "-o", "y", "--max-concurrency", "0"], "--max-concurrency must be at least 1, got 0."),
    ],
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-batch", *flags]) == 2
    assert capsys.readouterr().err == f"sempre: error: {message}\n"
