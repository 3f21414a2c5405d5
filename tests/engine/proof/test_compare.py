"""Two runs are equal, or their first differences are shown; the report opens in a browser."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from sempre.engine import LLM, RequestOutput, SamplingParams, load_outputs, save_outputs
from sempre.engine.cli.main import main
from sempre.engine.outputs import Logprob
from sempre.engine.proof.logprob_bits import from_bits
from sempre.engine.proof.receipt_log import receipt_files
from sempre.engine.proof.report_html import report_html
from sempre.engine.proof.run_comparison import compare_runs, load_run, num_by_position
from sempre.workers.fingerprint import CPU_PROFILE

PROMPTS = ["It is a truth", "The sea, the sea, the", "Once upon a time", "It was the best of times"] * 2
CHROMIUM = shutil.which("chromium")


def generated(folder: Path, **settings: Any) -> list[RequestOutput]:
    """Outputs of the same requests, with receipts in `folder`."""
    params = [
        SamplingParams(temperature=0.9, max_tokens=12, logprobs=None if i == 7 else 2, seed=i % 5, ignore_eos=True)
        for i in range(8)
    ]
    keywords: dict[str, Any] = {"max_model_len": 256, "num_threads": 1, "multiprocessing": False, **settings}
    with LLM("tiny", record=str(folder), **keywords) as llm:
        return llm.generate(PROMPTS, params, use_tqdm=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files a.jsonl and b.jsonl of equal runs, folders of their receipts, and control.jsonl of another matmul."""
    folder = tmp_path_factory.mktemp("runs")
    save_outputs(generated(folder / "a"), folder / "a.jsonl")
    other = generated(folder / "b", max_num_batched_tokens=24, max_num_seqs=4)
    # the order of the outputs does not matter
    save_outputs(other[::-1], folder / "b.jsonl")
    save_outputs(generated(folder / "c", numerics="control"), folder / "control.jsonl")
    return folder


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["compare", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("a", "b", "logprobs"), [("a.jsonl", "b.jsonl", None), ("a", "b", 96), ("a.jsonl", "b", 84)])
def test_equal_runs(a: str, b: str, logprobs: int | None, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare(capsys, runs / a, runs / b)
    assert (code, found["verdict"], found["outputs"], found["tokens"]) == (0, "equal", 8, 96)
    # one of the outputs was saved without log-probabilities
    assert logprobs is None or found["logprobs"] == logprobs
    assert found["sentence"].endswith("log-probabilities: equal, bit for bit")


def test_another_kernel(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare(capsys, runs / "a.jsonl", runs / "control.jsonl")
    assert (code, found["verdict"]) == (5, "different")
    assert len(found["different"]) == sum(found["kinds"].values()) >= 7
    assert found["tokens_until_first_difference"]["least"] == 0
    assert found["fingerprint_changes"][0].startswith("fingerprint ")
    code, found = compare(capsys, runs / "a", runs / "c")
    assert (code, found["fingerprint_changes"]) == (5, [f"numerics: {CPU_PROFILE} against control"])
    assert main(["compare", str(runs / "a"), str(runs / "c")]) == 5
    assert "kept as marks" in capsys.readouterr().out


def changed(output: RequestOutput, position: int, **what: Any) -> RequestOutput:
    """Change a token, the bits of its log-probability by one, or the end of an output."""
    completion = output.outputs[0]
    rows = [dict(row) for row in completion.logprobs or []]
    token_ids = list(completion.token_ids)
    token_id = token_ids[position]
    entry = rows[position][token_id]
    if "token" in what:
        token_ids[position] = what["token"]
        rows[position] = {what["token"]: entry}
    if "ulp" in what:
        bits = int.from_bytes(struct.pack("<f", entry.logprob), "little") + what["ulp"]
        rows[position][token_id] = Logprob(from_bits(bits), entry.rank, entry.decoded_token)
    if "beside" in what:
        last = list(rows[position])[-1]
        rows[position][last] = Logprob(-50.0, rows[position][last].rank)
    fields = {name: value for name, value in what.items() if name in ("finish_reason", "error")}
    fresh = dataclasses.replace(completion, token_ids=token_ids, logprobs=rows, **fields)
    return dataclasses.replace(output, outputs=[fresh])


KINDS: dict[str, tuple[dict[str, Any], str, int | None, str]] = {
    "token": ({"token": 3}, "token", 5, "at output token 5, after "),
    "logprob": ({"ulp": 1}, "logprob", 5, ", 1 ulp apart"),
    "distribution": ({"beside": 1}, "distribution", 5, "other log-probabilities beside it"),
    "end": ({"finish_reason": "stop"}, "end", None, "12 tokens, ended: length against 12 tokens, ended: stop"),
    "error": ({"error": "it broke"}, "error", None, " against it broke"),
}


@pytest.mark.parametrize("name", KINDS)
def test_one_difference(name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what, kind, position, sentence = KINDS[name]
    outputs = load_outputs(runs / "a.jsonl")
    outputs[2] = changed(outputs[2], 5, **what)
    save_outputs(outputs, tmp_path / "x.jsonl")
    code, found = compare(capsys, runs / "a.jsonl", tmp_path / "x.jsonl")
    [difference] = found["different"]
    assert (code, difference["kind"], difference["position"]) == (5, kind, position)
    assert sentence in difference["sentence"]
    if kind in ("token", "logprob"):
        assert difference["first"]["bits"].startswith("0x")
        # against a receipt, which has marks only, the same is found
        code, found = compare(capsys, runs / "a", tmp_path / "x.jsonl")
        [difference] = found["different"]
        assert (difference["kind"], difference["position"]) == (kind, position)
        if kind == "logprob":
            assert ", 1 ulp apart" in difference["sentence"]


def test_a_shorter_output(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = load_outputs(runs / "a.jsonl")
    short = dataclasses.replace(
        outputs[1].outputs[0],
        token_ids=outputs[1].outputs[0].token_ids[:4],
        logprobs=list(outputs[1].outputs[0].logprobs or [])[:4],
    )
    outputs[1] = dataclasses.replace(outputs[1], outputs=[short])
    save_outputs(outputs, tmp_path / "x.jsonl")
    code, found = compare(capsys, runs / "a.jsonl", tmp_path / "x.jsonl")
    assert (code, found["different"][0]["kind"], found["different"][0]["position"]) == (5, "length", 4)


def test_outputs_without_a_partner(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = load_outputs(runs / "a.jsonl")
    outputs[0].outputs[0].seed = 77
    save_outputs(outputs[:6], tmp_path / "x.jsonl")
    code, found = compare(capsys, runs / "a.jsonl", tmp_path / "x.jsonl")
    assert (code, found["outputs"], len(found["only_a"]), len(found["only_b"])) == (5, 5, 3, 1)
    assert "3 more in " in found["sentence"]
    save_outputs([], tmp_path / "empty.jsonl")
    code, found = compare(capsys, tmp_path / "empty.jsonl", tmp_path / "empty.jsonl")
    assert (code, found["sentence"]) == (5, "0 outputs, 0 tokens: nothing to compare")


def test_bad_lines(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (runs / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_text("".join(text[:3]) + "{\n" + "".join(text[4:]))
    assert main(["compare", str(tmp_path / "x.jsonl"), str(tmp_path / "x.jsonl")]) == 6
    assert "not read: " in capsys.readouterr().out
    receipts = receipt_files(runs / "a")[0]
    (tmp_path / "r.jsonl").write_bytes(receipts.read_bytes()[:-5])
    code, found = compare(capsys, runs / "a", tmp_path / "r.jsonl")
    assert (code, len(found["only_a"]), len(found["problems"])) == (5, 1, 1)
    (tmp_path / "text").write_text("hello\n")
    assert main(["compare", str(tmp_path / "text"), str(tmp_path / "text")]) == 1
    assert "line 1: expected a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "expected two runs to compare, found 1"),
        (["http://a", "http://b"], "two servers need --requests FILE"),
        (["a.jsonl", "b.jsonl", "--requests", "a"], "--requests is for two servers"),
        (["a.jsonl", "http://127.0.0.1:9"], "has no receipts: only they say with which parameters"),
    ],
    ids=str,
)
def test_usage(arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(runs / word) if word in ("a", "a.jsonl", "b.jsonl") else word for word in arguments]
    assert main(["compare", *given]) == 2
    assert message in capsys.readouterr().err


def test_parameters_of_receipts_that_differ(runs: Path, tmp_path: Path) -> None:
    a, b = load_run(runs / "a"), load_run(runs / "c")
    b.params = {name: {**params, "top_k": 3} for name, params in b.params.items()}
    found = compare_runs(a, b)
    assert found.different[0].changed_params == ("top_k: default against 3",)
    assert "parameter top_k: default against 3" in report_html(found)


def test_positions_in_bins() -> None:
    assert num_by_position([]) == []
    assert num_by_position([0, 0, 3]) == [(0, 0, 2), (1, 1, 0), (2, 2, 0), (3, 3, 1)]
    bins = num_by_position(list(range(100)))
    assert len(bins) == 12
    assert sum(count for _, _, count in bins) == 100


def test_the_report_contains_no_markup_of_outputs(runs: Path, tmp_path: Path) -> None:
    outputs = load_outputs(runs / "a.jsonl")
    outputs[2] = changed(outputs[2], 5, token=3)
    rows = list(outputs[2].outputs[0].logprobs or [])
    rows[5] = {3: Logprob(-1.0, 1, "<script>alert(1)</script>")}
    outputs[2].outputs[0].logprobs = rows
    save_outputs(outputs, tmp_path / "x.jsonl")
    html = report_html(compare_runs(load_run(runs / "a.jsonl"), load_run(tmp_path / "x.jsonl")))
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on the PATH (Debian's package of that name)")
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_the_report_in_a_browser(width: int, scheme: Any, runs: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    report = tmp_path / "report.html"
    assert main(["compare", str(runs / "a.jsonl"), str(runs / "control.jsonl"), "--html", str(report)]) == 5
    complaints: list[str] = []
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(report.as_uri())
        assert page.inner_text("#verdict").endswith("different")
        assert page.locator("article").count() >= 7
        assert page.locator("article").first.locator("mark").count() == 2
        # nothing is wider than the screen
        assert page.evaluate("document.documentElement.scrollWidth") == width
        columns = page.evaluate("getComputedStyle(document.querySelector('.sides')).gridTemplateColumns").split()
        assert len(columns) == (2 if width > 800 else 1)
        browser.close()
    assert complaints == []
