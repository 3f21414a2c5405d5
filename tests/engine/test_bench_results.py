"""Results of benchmarks: tables, two beside each other, several loads, a drawing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from scripted_http import Answer, events, scripted_server, text_chunk

from sempre.engine.cli.bench.compare import Change, changes, load_results
from sempre.engine.cli.bench.plot import write_plot
from sempre.engine.cli.bench.tables import offline_table
from sempre.engine.cli.main import main

USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
SVG = "{http://www.w3.org/2000/svg}"


def served(rate: float | str, tokens_per_s: float, ttft: float, **more: Any) -> dict[str, Any]:
    figures = {"output_throughput": tokens_per_s, "median_ttft_ms": ttft, "median_e2el_ms": 9 * ttft}
    return {"request_rate": rate, "max_concurrency": None, "max_concurrent_requests": 3, **figures, **more}


def written(path: Path, *documents: Any) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def test_two_results_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(tmp_path / "a.json", served(2, 100.0, 50.0, model_id="one"))
    b = written(tmp_path / "b.json", served(2, 150.0, 60.0, model_id="two"))
    assert main(["bench", "compare", a, b]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "the setting model_id differs: one and two" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown if line}
    assert rows["output_throughput"] == ["100.00", "150.00", "+50.0%", "better"]
    assert rows["median_ttft_ms"] == ["50.00", "60.00", "+20.0%", "worse"]
    assert rows["max_concurrent_requests"] == ["3.00", "3.00", "+0.0%"]
    assert main(["bench", "compare", a, b, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["settings_that_differ"] == {"model_id": ["one", "two"]}
    assert [figure["relative"] for figure in document["figures"][1:3]] == [0.5, 0.2]


def test_runs_of_equal_load_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(tmp_path / "a.json", {"runs": [served(1, 10.0, 5.0), served(2, 20.0, 6.0), served(4, 1.0, 1.0)]})
    b = written(tmp_path / "b.json", served(2, 22.0, 6.0), served(1, 9.0, 5.0))
    assert main(["bench", "compare", a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["load"]["request_rate"], one["figures"][1]["relative"]) for one in found] == [(1, -0.1), (2, 0.1)]


def test_what_a_benchmark_printed_is_a_result(tmp_path: Path) -> None:
    result = {"avg_latency": 0.5, "latencies": [0.4, 0.6], "percentiles": {"50": 0.5}}
    path = tmp_path / "printed"
    path.write_text(f"{offline_table(result)}\n{json.dumps(result)}\n")
    assert load_results(path) == [result]
    assert changes(result, {**result, "percentiles": {"50": 0.25}})[-1] == Change("percentiles.50", 0.5, 0.25)
    assert changes(result, {**result, "percentiles": {"50": 0.25}})[-1].word == "better"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["{}", "{}"], "have no figure in common: different benchmarks or loads"),
        (["nothing", "{}"], "a.json holds no result of a benchmark"),
        (["[1]", "{}"], "a.json holds no result of a benchmark"),
        (["{nonsense", "{}"], "a.json is not a result of a benchmark"),
        (["{}"], "expected two results to compare, found 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[str], message: str
) -> None:
    paths = []
    for name, text in zip("ab", texts, strict=False):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(text)
    assert main(["bench", "compare", *map(str, paths)]) == 2
    assert message in capsys.readouterr().err


def test_tables_of_engines_without_a_server() -> None:
    result = {"avg_latency": 0.5, "latencies": [0.4, 0.6], "percentiles": {"50": 0.5, "99": 0.6}}
    assert [line.split() for line in offline_table(result).splitlines()[1:]] == [
        ["Runs:", "2"],
        ["Mean", "(s):", "0.50"],
        ["P50", "(s):", "0.50"],
        ["P99", "(s):", "0.60"],
    ]
    start = {
        "avg_warm_startup_time": 2.0,
        "warm_startup_times": [2.0],
        "warm_startup_percentiles": {"50": 2.0},
        "warm_startup_phases": [{"start": 0.5, "load": 1.5, "load.imports": 1.0}],
    }
    assert [line.split() for line in offline_table(start).splitlines()[1:]] == [
        ["Runs:", "1"],
        ["Mean", "(s):", "2.00"],
        ["start", "(s):", "0.50"],
        ["load", "(s):", "1.50"],
    ]


def test_a_drawing_has_every_point_and_needs_nothing_else(tmp_path: Path) -> None:
    runs = {"<a>": [served(rate, 10.0 * rate, 5.0 + rate) for rate in (8, 1, 2, 4, 16)]}
    write_plot(tmp_path / "load.svg", runs)
    tree = ElementTree.parse(tmp_path / "load.svg")
    points = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in tree.iter(f"{SVG}circle")]
    assert len(points) == 15
    # points of a line go right, and a higher figure is higher up
    for start in (0, 5, 10):
        line = points[start : start + 5]
        assert [x for x, _ in line] == sorted(x for x, _ in line)
        assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)
        assert all(0 < x < 460 and 0 < y < 300 for x, y in line)
    write_plot(tmp_path / "load.html", runs)
    page = (tmp_path / "load.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") == 1


def test_several_loads_are_measured_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(lambda path, body: Answer(pieces=[events(text_chunk("a"), text_chunk("b"), USAGE)])) as server:
        load = ["--num-prompts", "3", "--random-input-len", "4", "--random-output-len", "4"]
        saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.jsonl"]
        plot = ["--plot", str(tmp_path / "r.svg")]
        sweep = ["--request-rate", "100,200"]
        assert main(["bench", "serve", "--base-url", server.url, *load, *saved, *plot, *sweep]) == 0
    shown = capsys.readouterr().out.splitlines()
    results = json.loads(shown[-1])["runs"]
    assert [result["request_rate"] for result in results] == [100.0, 200.0]
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()] == results
    assert [line.split()[0] for line in shown[-3:-1]] == ["100.0", "200.0"]
    assert (tmp_path / "r.svg").read_text().count("<circle") == 6
    # a cached prefix of one load must not help the next
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--request-rate", "1,2", "--max-concurrency", "1,2"], "not to both"),
        (["--request-rate", "1,0"], "--request-rate must be positive, got 0.0."),
        (["--request-rate", "1,x"], "expected numbers separated by commas, got '1,x'"),
        (["--plot", "load.png"], "--plot: the name must end with .svg or .html, got 'load.png'"),
    ],
)
def test_loads_that_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1", *flags]) == 2
    assert message in capsys.readouterr().err
