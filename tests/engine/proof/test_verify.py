"""All axes are equal for the embedded model, and a broken kernel, engine or server is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_completions import CompletionsServer

from sempre.engine.cli.main import main
from sempre.engine.cli.verify import Table
from sempre.engine.proof.axis_result import AxisResult, judged, not_checked
from sempre.engine.proof.verification import Verification, requests

FLAGS = ["--num-threads", "1"]


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit code, and the rows by axis."""
    capsys.readouterr()
    code = main(["verify", *arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    return code, {row["axis"]: row for row in document["axes"]}


def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = verify(capsys, "tiny", *FLAGS)
    assert code == 0
    controls = {name for name in rows if name.startswith("control: ")}
    assert len(controls) == 2
    assert all(rows[name]["verdict"] == "different" for name in controls)
    assert {name: row["verdict"] for name, row in rows.items() if name not in controls} == dict.fromkeys(
        rows.keys() - controls, "equal"
    )
    assert len(rows) == 17
    assert sum(row["num_logprobs"] for row in rows.values()) > 15_000


def test_a_kernel_that_depends_on_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """The planted fault: the ordinary matmul in the engine that is checked."""
    axes = Verification("tiny", {"num_threads": 1, "numerics": "control"}).results()
    first = next(axes)
    axes.close()
    assert (first.axis, first.verdict) == ("batch: all at once", "different")
    assert first.num_different > 6
    assert first.detail is not None
    assert "at output token" in first.detail


def test_the_requests_are_for_any_vocabulary() -> None:
    for vocab_size in (32, 200_000):
        asked = requests(vocab_size)
        assert max(max(each.prompt) for each in asked) < vocab_size
        assert max(len(each.prompt) for each in asked) == 300


def row(axis: str, verdict: Any, **fields: Any) -> AxisResult:
    return AxisResult(verdict, axis, **fields)


@pytest.mark.parametrize(
    ("rows", "code", "sentence"),
    [
        ([row("a", "equal"), row("c", "different", is_control=True)], 0, "equal, bit for bit, on 1 axes"),
        ([row("a", "different"), row("c", "different", is_control=True)], 5, "not invariant: a"),
        ([row("a", "equal"), row("c", "equal", is_control=True)], 6, "nothing was shown: c should differ and did not"),
        ([row("a", "different"), row("c", "equal", is_control=True)], 5, "not invariant: a"),
        ([row("a", "equal"), row("b", "not checked")], 0, "; not checked: b"),
    ],
)
def test_verdicts(rows: list[AxisResult], code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(as_json=False)
    table.begin("x")
    for each in rows:
        table.add(each)
    assert table.end() == code
    assert sentence in capsys.readouterr().out


def test_rows_of_nothing() -> None:
    assert judged([], []).verdict == "equal"
    assert not_checked("why\nmore").detail == "why"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "other"], "expected one model, found tiny, other"),
        (["--engine", "vllm"], "--engine vllm needs --url, the address of that server"),
        (["--engine", "tgi"], "invalid choice: 'tgi'"),
        (["--url", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype: set these when you start the server"),
    ],
    ids=str,
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["verify", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers" in capsys.readouterr().err


@pytest.fixture
def scripted() -> Iterator[CompletionsServer]:
    with CompletionsServer() as server:
        yield server


@pytest.mark.parametrize("form", ["completions", "chat", "none"])
@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_a_server_that_is_invariant(
    form: str, engine: str, scripted: CompletionsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.logprobs_form = form
    code, rows = verify(capsys, "--url", scripted.url, "--engine", engine)
    assert code == 0
    assert {name: found["verdict"] for name, found in rows.items()} == {
        "retried": "equal",
        "under load": "equal",
        "order of arrival": "equal",
        "streamed": "equal",
        "without log-probabilities": "equal",
        "completions of n": "equal",
        "control: other seeds": "different",
    }
    assert (rows["retried"]["num_logprobs"] > 0) is (form != "none")
    assert all(("ignore_eos" in body) is (engine == "vllm") for body in scripted.bodies)


FAULTS = {
    "load": {"under load", "order of arrival", "streamed", "completions of n"},
    "history": {"retried", "under load", "order of arrival", "streamed", "completions of n"},
    "stream": {"streamed"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_is_not(fault: str, scripted: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.fault = fault
    code, rows = verify(capsys, "--url", scripted.url, "--engine", "vllm")
    assert code == 5
    found = {name for name, each in rows.items() if each["verdict"] == "different"} - {"control: other seeds"}
    assert FAULTS[fault] & found
    assert found <= FAULTS[fault] | {"without log-probabilities"}


def test_a_server_that_ignores_seeds(scripted: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.fault = "no seed"
    code, rows = verify(capsys, "--url", scripted.url, "--engine", "vllm")
    assert (code, rows["control: other seeds"]["verdict"]) == (6, "equal")


def test_a_server_that_refuses_n(scripted: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.fault = "no n"
    code, rows = verify(capsys, "--url", scripted.url, "--engine", "llama.cpp")
    assert (code, rows["completions of n"]["verdict"]) == (0, "not checked")
    assert "the server refuses it: n must be 1" in rows["completions of n"]["detail"]
