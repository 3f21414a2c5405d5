"""`sempre bench`: result keys, and flags that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sempre.engine.cli.bench.offline import percentiles, random_requests
from sempre.engine.cli.main import main

MODEL = ["--model", "tiny", "--device", "cpu", "--max-model-len", "256", "--num-threads", "1"]


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["bench", *arguments, *MODEL]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_latency(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    flags = [
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--batch-size",
        "2",
        "--num-iters-warmup",
        "1",
        "--num-iters",
        "3",
    ]
    result = result_of(capsys, "latency", *flags, "--no-multiprocessing", "--output-json", str(file))
    assert set(result) == {"avg_latency", "latencies", "percentiles"}
    assert isinstance(result["latencies"], list)
    assert len(result["latencies"]) == 3
    assert json.loads(file.read_text()) == result


def test_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(
        capsys,
        "throughput",
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--num-prompts",
        "3",
        "--n",
        "2",
        "--no-multiprocessing",
    )
    assert result["num_requests"] == 3
    assert result["total_num_tokens"] == 3 * (8 + 2 * 4)
    assert {"elapsed_time", "requests_per_second", "tokens_per_second"} <= set(result)


def test_startup(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(capsys, "startup", "--num-iters-cold", "0", "--num-iters-warmup", "0", "--num-iters-warm", "1")
    assert isinstance(result["warm_startup_times"], list)
    assert result["avg_warm_startup_time"] == result["warm_startup_times"][0]
    (phases,) = result["warm_startup_phases"]
    assert {"start", "load", "load.imports", "load.load_weights", "warm_up"} <= phases.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--num-prompts", "3"], "--num-prompts belongs to throughput, not to latency."),
        (["throughput", "--output-len", "0"], "--output-len must be at least 1, got 0."),
        (["speed"], "invalid choice"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", *arguments, *MODEL]) == 2
    assert message in capsys.readouterr().err


def test_requests_are_a_function_of_the_seed() -> None:
    make = {"vocab_size": 100, "input_len": 5, "output_len": 2, "n": 2}
    assert random_requests(2, seed=1, **make) == random_requests(2, seed=1, **make)
    assert random_requests(2, seed=1, **make) != random_requests(2, seed=2, **make)
    assert len({spec.request_id for spec in random_requests(2, seed=1, **make)}) == 4


def test_percentiles() -> None:
    assert percentiles([3.0, 1.0, 2.0])["50"] == 2.0
    assert percentiles([0.0, 10.0])["90"] == pytest.approx(9.0)
