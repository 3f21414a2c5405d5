"""Receipts over HTTP: with a header, whole and streamed, and in the files of a server."""

from __future__ import annotations

import base64
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from receipts import altered_receipt, record_under_load
from server_process import ServerProcess

from sempre.engine import LLM, SamplingParams
from sempre.engine.cli.main import main
from sempre.engine.proof.receipt_log import Receipt, ReceiptFollower, read_receipts, receipt_files
from sempre.engine.proof.statement import Statement, decode, recorded_bits_of

HEADER = {"X-Sempre-Receipt": "1"}
BODY: dict[str, Any] = {"prompt": "It is a truth", "max_tokens": 6, "seed": 5, "n": 2, "ignore_eos": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 3}


def statement_of(choice: dict[str, Any]) -> Statement:
    return decode(base64.b64decode(choice["receipt"]["payload"]))


def streamed(server: ServerProcess, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = server.http.post(path, json={**body, "stream": True}, headers=HEADER).text
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    return [choice for event in events for choice in json.loads(event)["choices"]]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
def test_choices_with_receipts(path: str, body: dict[str, Any], server: ServerProcess) -> None:
    plain = server.http.post(path, json=body).json()["choices"]
    found = server.http.post(path, json=body, headers=HEADER).json()["choices"]
    statements = [statement_of(choice) for choice in found]
    assert [{k: v for k, v in choice.items() if k != "receipt"} for choice in found] == plain
    seeds = [each.predicate.build_definition.external_parameters.seed for each in statements]
    assert seeds == [str(choice["seed"]) for choice in plain]
    ended = [choice for choice in streamed(server, path, body) if "receipt" in choice]
    assert all(choice["finish_reason"] for choice in ended)
    subjects = [statement_of(choice).subject for choice in sorted(ended, key=lambda choice: int(choice["index"]))]
    assert subjects == [each.subject for each in statements]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/messages", CHAT), ("/v1/responses", {"input": "Hi", "max_output_tokens": 4, "seed": 3})]
)
def test_answers_of_agents_with_receipts(path: str, body: dict[str, Any], server: ServerProcess) -> None:
    """The subject is that of the same conversation at /v1/chat/completions."""
    chat = server.http.post("/v1/chat/completions", json=CHAT, headers=HEADER).json()
    expected = statement_of(chat["choices"][0]).subject
    assert "receipt" not in server.http.post(path, json=body).json()
    assert statement_of(server.http.post(path, json=body, headers=HEADER).json()).subject == expected
    text = server.http.post(path, json={**body, "stream": True}, headers=HEADER).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    told = [event.get("response", event) for event in events]
    assert [statement_of(each).subject for each in told if "receipt" in each] == [expected]


def test_the_subject_is_that_of_a_local_engine(server: ServerProcess) -> None:
    [choice] = server.http.post("/v1/completions", json={**BODY, "n": 1}, headers=HEADER).json()["choices"]
    with LLM("tiny", record=True, max_model_len=256, num_threads=1, multiprocessing=False) as llm:
        params = SamplingParams(max_tokens=6, seed=5, ignore_eos=True, logprobs=3)
        [output] = llm.generate(BODY["prompt"], params, use_tqdm=False)
    local = decode(base64.b64decode(json.loads(output.outputs[0].receipt or "")["payload"]))
    assert statement_of(choice).subject == local.subject
    assert statement_of(choice).predicate.build_definition.internal_parameters.bits_by_name == recorded_bits_of(
        llm.fingerprint_parts
    )
    other = server.http.post("/v1/completions", json={**BODY, "n": 1, "seed": 6}, headers=HEADER).json()["choices"]
    assert statement_of(other[0]).subject != local.subject


def test_what_is_refused(server: ServerProcess) -> None:
    refused = server.http.post("/v1/completions", json=BODY, headers={"X-Sempre-Receipt": "yes"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "The header X-Sempre-Receipt must be 0 or 1, got 'yes'."
    search = {**BODY, "use_beam_search": True, "temperature": 0}
    refused = server.http.post("/v1/completions", json=search, headers=HEADER)
    assert (refused.status_code, "Beams have receipts if the server records all" in refused.text) == (400, True)
    assert server.http.post("/v1/completions", json=BODY, headers={"X-Sempre-Receipt": "0"}).status_code == 200


def test_the_files_of_a_server(tmp_path: Path) -> None:
    folder = tmp_path / "receipts"
    flags = ("--max-model-len", "256", "--num-threads", "1", "--record", str(folder))
    with ServerProcess(tmp_path / "log", *flags) as server:
        assert server.complete(**BODY).json()["choices"][0].keys() & {"receipt"} == set()
        [choice, _] = server.http.post("/v1/completions", json=BODY, headers=HEADER).json()["choices"]
        # a refused request has none; each beam of a search has one
        assert server.complete(**{**BODY, "max_tokens": 0.5}).status_code == 400
        assert server.complete(**BODY, use_beam_search=True).status_code == 200
        (tmp_path / "away").mkdir()
        [file] = receipt_files(folder)
        file.rename(tmp_path / "away" / file.name)
        failed = server.complete(**BODY)
        assert failed.status_code == 500
        assert failed.json()["error"]["message"].startswith("The receipt of this output could not be written")
        (tmp_path / "away" / file.name).rename(file)
        assert server.complete(**BODY).status_code == 200
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    whole = [list(read_receipts(path)) for path in receipt_files(folder)]
    assert [[isinstance(each, Receipt) for each in found] for found in whole[:1]] == [[True] * 6]
    assert all(isinstance(each, Receipt) for found in whole for each in found)
    assert json.dumps(choice["receipt"], separators=(",", ":"), sort_keys=True) in file.read_text()


def test_receipts_are_made_again_over_http(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = record_under_load(tmp_path / "receipts", 16, num_threads=1)
    code = main(["replay", str(tmp_path / "receipts"), "--url", server.url, "--json"])
    found = json.loads(capsys.readouterr().out)
    # this server reports at most 20 log-probabilities, so it refuses the two requests for all
    assert (code, found["outputs"], found["different"]) == (6, count - 2, [])
    assert all("logprobs" in each["problem"] for each in found["not_judged"])
    line = receipt_files(tmp_path / "receipts")[0].read_bytes().splitlines()[3]

    def another_seed(statement: dict[str, Any]) -> None:
        request = statement["predicate"]["buildDefinition"]["externalParameters"]
        request.update(seed="1", sampling={"max_tokens": 30})

    path = altered_receipt(line, another_seed, tmp_path / "x.jsonl")
    assert main(["replay", str(path), "--url", server.url]) == 5
    assert "different: " in capsys.readouterr().out
    assert main(["replay", str(path), "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_running_server_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "receipts"

    def num_lines() -> int:
        return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*.jsonl"))

    def another_token(statement: dict[str, Any]) -> None:
        statement["predicate"]["output"]["tokenIds"][2] ^= 1

    codes: list[int] = []
    with ServerProcess(
        tmp_path / "log", "--max-model-len", "256", "--num-threads", "1", "--record", str(folder)
    ) as server:
        command = ["replay", str(folder), "--url", server.url, "--follow", "--json"]
        audit = Thread(target=lambda: codes.append(main(command)), daemon=True)
        assert server.complete(**BODY).status_code == 200
        audit.start()
        # the server records the answers to the audit, too; these are not replayed in turn
        wait_until(lambda: num_lines() >= 4)
        assert server.complete(**{**BODY, "seed": 6}).status_code == 200
        wait_until(lambda: num_lines() >= 8)
        line = receipt_files(folder)[0].read_bytes().splitlines()[0]
        altered_receipt(line, another_token, folder / "z.jsonl")
        audit.join(300.0)
    assert codes == [5]
    found = json.loads(capsys.readouterr().out)
    assert (found["outputs"], found["not_judged"]) == (5, [])
    [difference] = found["different"]
    assert (difference["kind"], difference["position"]) == ("token", 2)


def test_lines_that_are_being_written(tmp_path: Path) -> None:
    with LLM("tiny", record=str(tmp_path / "r"), max_model_len=256, num_threads=1, multiprocessing=False) as llm:
        llm.generate(["a", "b", "c"], SamplingParams(max_tokens=3), use_tqdm=False)
    lines = receipt_files(tmp_path / "r")[0].read_bytes().splitlines(keepends=True)
    follower, path = ReceiptFollower(), tmp_path / "f"
    path.mkdir()
    assert list(follower.added(path)) == []
    file = path / "x.jsonl"
    file.write_bytes(lines[0] + lines[1][:50])
    assert [each.line for each in follower.added(path) if isinstance(each, Receipt)] == [1]
    file.write_bytes(b"".join(lines))
    assert [each.line for each in follower.added(path) if isinstance(each, Receipt)] == [2, 3]
    file.write_bytes(b"".join(lines) + lines[1])
    [error] = follower.added(path)
    assert "line 4: previous: expected the digest of the line before" in str(error)
    assert list(follower.added(path)) == []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300.0
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_runs_are_compared_with_servers(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM("tiny", record=str(tmp_path / "r"), max_model_len=256, num_threads=1, multiprocessing=False) as llm:
        llm.generate(["a", "b", "c"], SamplingParams(max_tokens=5, logprobs=1), use_tqdm=False)
    assert main(["compare", str(tmp_path / "r"), server.url]) == 0
    assert capsys.readouterr().out == "3 outputs, 15 tokens, 15 log-probabilities: equal, bit for bit\n"
    assert main(["compare", server.url, server.url, "--requests", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["logprobs"] == 15
