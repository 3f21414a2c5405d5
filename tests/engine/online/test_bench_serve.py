"""`sempre bench serve`."""

from __future__ import annotations

import json
import ssl
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_http import Answer, events, refusal, scripted_server, text_chunk

from sempre.engine.cli.bench.load import Outcome
from sempre.engine.cli.bench.serving_metrics import summarize
from sempre.engine.cli.bench.traffic import arrival_times, random_samples
from sempre.engine.cli.main import main

KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate"),
    *("burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
    *(f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
}
DETAILS = {"input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors"}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def measure(capsys: pytest.CaptureFixture[str], url: str, *flags: str, code: int = 0) -> dict[str, Any]:
    assert main(["bench", "serve", "--base-url", url, *flags]) == code
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_a_server_under_load(capsys: pytest.CaptureFixture[str], tmp_path: Path, server_url: str) -> None:
    load = ["--num-prompts", "12", "--random-input-len", "9", "--random-output-len", "7", "--num-warmups", "2"]
    limits = ["--max-concurrency", "4", "--goodput", "ttft:60000", "e2el:60000", "--metadata", "card=none"]
    saved = ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    result = measure(capsys, server_url, *load, *limits, *saved)
    assert set(result) == KEYS | DETAILS | {"card"}
    assert (result["completed"], result["failed"], result["errors"]) == (12, 0, [""] * 12)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (12 * 9, 12 * 7)
    assert result["output_lens"] == [7] * 12
    # tokens of several steps may come in one event
    assert all(len(gaps) <= 6 for gaps in result["itls"])
    assert result["request_goodput"] == result["request_throughput"] == pytest.approx(12 / result["duration"])
    assert result["max_concurrent_requests"] <= 12
    assert json.loads((tmp_path / "r.json").read_text()) == result


def test_chats_under_load(capsys: pytest.CaptureFixture[str], server_url: str) -> None:
    load = ["--num-prompts", "4", "--random-input-len", "5", "--random-output-len", "6", "--request-rate", "100"]
    result = measure(capsys, server_url, "--backend", "openai-chat", *load, "--save-detailed")
    assert (result["completed"], result["output_lens"], result["request_rate"]) == (4, [6] * 4, 100.0)
    # the event with the role is no token
    assert all(len(gaps) <= 5 for gaps in result["itls"])


def test_a_sharegpt_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    turns = ["What is the meaning of all this, sir?", "I cannot tell you, for I do not know it."]
    path.write_text(json.dumps([{"conversations": [{"value": text} for text in turns]}, {"conversations": []}]))
    flags = ["--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "3", "--output-len", "4"]
    with scripted_server(lambda p, b: Answer(pieces=[events(text_chunk("a"), USAGE)])) as server:
        result = measure(capsys, server.url, *flags, "--extra-body", '{"seed": 3}', "--header", "X-A=b")
    assert result["completed"] == 3
    body = server.bodies[0]
    assert (body["prompt"], body["max_tokens"], body["seed"]) == (turns[0], 4, 3)
    assert "ignore_eos" not in body
    assert server.headers[0]["x-a"] == "b"


def test_a_certificate_that_nobody_signed_is_taken_when_told_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=elsewhere"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    flags = ["--num-prompts", "2", "--random-input-len", "3", "--save-detailed"]
    with scripted_server(lambda p, b: Answer(pieces=[events(text_chunk("a"), USAGE)]), tls) as server:
        # which model there is must be asked through the same door
        assert main(["bench", "serve", "--base-url", server.url, *flags]) != 0
        assert "certificate" in capsys.readouterr().err.lower()
        refused = measure(capsys, server.url, *flags, "--model", "tiny", code=1)
        assert (refused["completed"], len(server.bodies)) == (0, 0)
        assert all("certificate" in error.lower() for error in refused["errors"])
        for model in ([], ["--model", "tiny"]):
            assert measure(capsys, server.url, *flags, *model, "--insecure")["completed"] == 2


def test_a_certificate_of_a_named_authority_is_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=here"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    flags = ["--num-prompts", "2", "--random-input-len", "3", "--ca-file", str(certificate)]
    with scripted_server(lambda p, b: Answer(pieces=[events(text_chunk("a"), USAGE)]), tls) as server:
        assert measure(capsys, server.url, *flags)["completed"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ca-file", "/nowhere/ca.pem"], "--ca-file /nowhere/ca.pem: no certificates in PEM could be read"),
        (["--ca-file", __file__], f"--ca-file {__file__}: no certificates in PEM could be read"),
        (["--ca-file", "/nowhere/ca.pem", "--insecure"], "--ca-file and --insecure exclude each other"),
    ],
)
@pytest.mark.parametrize("command", [["complete", "-q", "a"], ["chat", "-q", "a"], ["bench", "serve"]])
def test_unusable_authorities_are_refused(
    capsys: pytest.CaptureFixture[str], command: list[str], flags: list[str], message: str
) -> None:
    where = ["--base-url" if command[0] == "bench" else "--url", "https://127.0.0.1:9"]
    assert main([*command, *where, *flags]) == 2
    assert message in capsys.readouterr().err


def test_requests_that_fail_are_counted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    endings = [
        refusal("busy", 503),
        Answer(pieces=[events(text_chunk("a"), done=False)]),
        Answer(pieces=[events(text_chunk("a"), done=False)], cut=True),
        Answer(pieces=[events({"error": {"message": "lost"}})]),
        Answer(pieces=[b"data: {nonsense\n\n"]),
        Answer(pieces=[events()]),
        Answer(pieces=[events(text_chunk("a", error=None), text_chunk("b"), USAGE)]),
    ]
    remaining = list(endings)
    with scripted_server(lambda path, body: remaining.pop(0)) as server:
        flags = ["--num-prompts", "7", "--max-concurrency", "1", "--random-input-len", "3", "--save-detailed"]
        result = measure(capsys, server.url, *flags, code=1)
    assert (result["completed"], result["failed"]) == (1, 6)
    for error, part in zip(
        result["errors"],
        [
            "status 503",
            "without [DONE]",
            "connection was lost",
            '"message": "lost"',
            "cannot be parsed",
            "contains no token",
            "",
        ],
        strict=True,
    ):
        assert part in error
    # of the server's usage, not of the number of events
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (3, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0."),
        (["--request-rate", "0"], "--request-rate must be positive, got 0.0."),
        (["--burstiness", "nan"], "--burstiness must be positive, got nan."),
        (["--random-range-ratio", "1"], "--random-range-ratio must be in [0, 1), got 1.0."),
        (
            ["--dataset-name", "sharegpt"],
            "--dataset-path FILE belongs to --dataset-name sharegpt, and is needed with it.",
        ),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics: 'x' is none of ttft, tpot, itl, e2el."),
        (
            ["--metric-percentiles", "101"],
            "--metric-percentiles must be numbers from 0 to 100 separated by commas, got '101'.",
        ),
        (["--goodput", "itl:3"], "--goodput: expected ttft|tpot|e2el:MILLISECONDS, got 'itl:3'."),
        (["--header", "X=a\r\nY: b"], "--header: 'X' is not a valid header."),
        (["--num-promts", "3"], "unknown flag --num-promts. Did you mean --num-prompts?"),
    ],
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert capsys.readouterr().err == f"sempre: error: {message}\n"


def test_figures_of_known_times() -> None:
    one = Outcome(start_time=10.0, ttft=0.5, itl=[0.1, 0.3], latency=0.9, prompt_tokens=5, output_tokens=3)
    two = Outcome(start_time=10.2, ttft=0.7, itl=[], latency=0.7, prompt_tokens=6, output_tokens=1)
    lost = Outcome(start_time=10.0, error="x")
    result = summarize([one, two, lost], 2.0, [50.0, 99.9], {"ttft": 600.0})
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["request_throughput"], result["request_goodput"]) == (1.0, 0.5)
    assert (result["output_throughput"], result["total_token_throughput"]) == (2.0, 7.5)
    assert result["mean_ttft_ms"] == pytest.approx(600.0)
    assert result["mean_tpot_ms"] == pytest.approx(200.0)
    assert result["p50_itl_ms"] == pytest.approx(200.0)
    assert result["p99.9_e2el_ms"] == pytest.approx(np.percentile([900.0, 700.0], 99.9))
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == (4.0, 2)


def test_traffic_is_a_function_of_the_seed() -> None:
    make = {"vocab_size": 99, "input_len": 20, "output_len": 10, "range_ratio": 0.5, "prefix_len": 3}
    samples = random_samples(50, seed=1, **make)
    assert samples == random_samples(50, seed=1, **make) != random_samples(50, seed=2, **make)
    assert len({tuple(sample.prompt[:3]) for sample in samples}) == 1
    assert {10 <= len(sample.prompt) - 3 <= 30 and 5 <= sample.output_len <= 15 for sample in samples} == {True}
    assert len({len(sample.prompt) for sample in samples}) > 5
    for burstiness in (0.1, 1.0, 100.0):
        times = arrival_times(400, rate=50.0, burstiness=burstiness, seed=3)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(8.0)
    spread = [np.std(np.diff(arrival_times(400, rate=50.0, burstiness=b))) for b in (0.1, 1.0, 100.0)]
    assert spread == sorted(spread, reverse=True)
    assert arrival_times(3, rate=float("inf"), burstiness=1.0) == [0.0] * 3
