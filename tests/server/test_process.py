"""Start, settings, keys, TLS, drain and end of a real server process."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml
from server_process import ServerProcess

from sempre.engine.cli.main import main

FLAGS = ("--max-model-len", "2048", "--max-num-seqs", "4", "--num-threads", "1")
LONG: dict[str, Any] = {"prompt": "It is a truth", "max_tokens": 400, "ignore_eos": True, "seed": 1}


class Background(threading.Thread):
    """One request whose answer is read later."""

    def __init__(self, server: ServerProcess, **fields: object) -> None:
        super().__init__()
        self.answer: httpx2.Response | None = None
        self._server = server
        self._fields = fields
        self.start()

    def run(self) -> None:
        with httpx2.Client(base_url=self._server.url, timeout=120.0) as http:
            self.answer = http.post("/v1/completions", json=self._fields)

    def result(self) -> httpx2.Response:
        self.join(120)
        assert self.answer is not None
        return self.answer


def wait_for_load(server: ServerProcess, num_sequences: int) -> None:
    while server.load()["num_sequences"] != num_sequences:
        time.sleep(0.01)


def test_drain_finishes_what_runs(tmp_path: Path) -> None:
    """SIGTERM: the running request ends well, a new one gets 503 with Retry-After, the exit code is 0."""
    # it runs for seconds, however late this process is with its requests
    fields = {**LONG, "max_tokens": 700}
    with ServerProcess(tmp_path / "log", *FLAGS) as server:
        expected = server.complete(**fields).json()["choices"]
        running = Background(server, **fields)
        wait_for_load(server, 1)
        server.terminate()
        while server.http.get("/ready").status_code == 200:
            time.sleep(0.01)
        refused = server.complete(prompt="a")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.http.get("/live").status_code == 200
        assert running.result().json()["choices"] == expected
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_drain_ends(tmp_path: Path, how: str) -> None:
    """Unfinished requests get an error, whole and streamed; the exit code is 0 and no process is left."""
    seconds = "0.2" if how == "timeout" else "600"
    with ServerProcess(tmp_path / "log", *FLAGS, "--shutdown-timeout", seconds) as server:
        workers = server.workers()
        whole = Background(server, **{**LONG, "max_tokens": 2000})
        streamed = Background(server, **{**LONG, "max_tokens": 2000}, stream=True)
        wait_for_load(server, 2)
        server.terminate()
        if how == "second signal":
            while server.http.get("/ready").status_code == 200:
                time.sleep(0.01)
            server.terminate()
        assert whole.result().status_code == 503
        lines = [line.removeprefix("data: ") for line in streamed.result().text.splitlines() if line]
        assert (json.loads(lines[-2])["error"]["code"], lines[-1]) == (503, "[DONE]")
        assert server.process.wait(30) == 0
        assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)


def test_a_full_queue_turns_away(tmp_path: Path) -> None:
    """Requests are logged, if the operator wants it, up to a length."""
    flags = ("--max-num-queued-reqs", "2", "--enable-log-requests", "--max-log-len", "5", "--log-format", "json")
    with ServerProcess(tmp_path / "log", *FLAGS, *flags) as server:
        running = [Background(server, **LONG, n=2) for _ in range(3)]
        wait_for_load(server, 6)
        refused = server.complete(prompt="a")
        assert refused.status_code == 503
        assert "busy" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        never = server.complete(prompt="a", n=7)
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=100) as client:
            # the client's own retries wait as they are told, however slow the machine, and find room
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        texts = [running_one.result().json()["choices"] for running_one in running]
        assert texts[0] == texts[1] == texts[2]
        assert 'admission_rejections_total{model_name="tiny"} ' in server.http.get("/metrics").text
        lines = [json.loads(line) for line in server.log.splitlines()]
    logged = [line for line in lines if line["message"] == "request" and "prompt" in line]
    assert [line["prompt"] for line in logged] == ["It is"] * 3 + ["a"]
    assert logged[0]["params"] == {"n": "2", "seed": "1", "max_tokens": "400", "ignore_eos": "True"}
    assert (logged[0]["seed"], logged[0]["num_prompt_tokens"]) == (1, len(logged[0]["prompt_token_ids"]))


def test_a_retry_after_a_restart_gives_the_same_answer(tmp_path: Path) -> None:
    """A seeded request that SIGKILL cut off, sent again to a new process, gives the tokens of an undisturbed run."""
    fields = {**LONG, "max_tokens": 300, "logprobs": 2}
    with ServerProcess(tmp_path / "log", *FLAGS) as server:
        expected = server.complete(**fields).json()
        with server.http.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.kill()
            with pytest.raises(httpx2.TransportError):
                list(lines)
        server.process.wait(20)
    with ServerProcess(tmp_path / "log2", *FLAGS) as server:
        # other work before it, so that batch, cache and ordinals differ
        server.complete(prompt=["It is", "The ship"], n=3, max_tokens=20)
        again = server.complete(**fields).json()
    assert again["choices"] == expected["choices"]
    assert again["system_fingerprint"] == expected["system_fingerprint"]


def test_keys_tls_body_limit_names_and_unknown_fields(tmp_path: Path) -> None:
    """Settings that one server can have together, each with what it lets through and what it refuses."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *files, *subject]
    subprocess.run(command, check=True, capture_output=True)
    keys = tmp_path / "keys"
    keys.write_text("from-the-file name=file max_sequences=2 requests_per_minute=40\n\n")
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--max-body-bytes", "2000"]
    flags += ["--served-model-name", "a", "--served-model-name", "b", "--ignore-unknown-fields"]
    flags += [
        "--root-path",
        "/proxied",
        "--allowed-origins",
        "https://page.example",
        "--metrics-prefix",
        "vllm",
        "--api-key-file",
        str(keys),
    ]
    context = ssl.create_default_context(cafile=certificate)
    environment = {"SEMPRE_API_KEY": "from-the-environment"}
    with ServerProcess(
        tmp_path / "log", *FLAGS, *flags, scheme="https", verify=context, environment=environment
    ) as server:
        check_keys(server, context)
        check_clients(server)
        server.http.headers["Authorization"] = "Bearer from-the-environment"
        assert "from-the" not in server.log.replace(str(keys), "") + server.http.get("/server_info").text
        done = server.complete(prompt="a", model="b", max_tokens=1, unheard_of=1)
        assert (done.status_code, done.json()["model"]) == (200, "b")
        assert server.complete(prompt="a", model="tiny").status_code == 404
        large = server.complete(prompt="a" * 3000)
        assert (large.status_code, large.json()["error"]["code"]) == (413, 413)
        parts = iter([b'{"prompt":"', b"a" * 3000, b'"}'])
        headers = {"Content-Type": "application/json"}
        assert server.http.post("/v1/completions", content=parts, headers=headers).status_code == 413
        seen = {}
        for origin in ("https://page.example", "https://other.example"):
            answer = server.http.get("/v1/models", headers={"Origin": origin})
            seen[origin] = answer.headers.get("access-control-allow-origin")
        assert seen == {"https://page.example": "https://page.example", "https://other.example": None}
        assert "vllm:num_requests_running" in server.http.get("/metrics").text
        described = server.http.get("/openapi.json").json()
        assert described["servers"] == [{"url": "/proxied"}]
        needing = {path for path, found in described["paths"].items() if any("security" in op for op in found.values())}
        assert "/v1/completions" in needing
        assert not needing & {"/health", "/metrics"}
        assert described["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
        assert "Warning" not in server.log


def check_keys(server: ServerProcess, context: ssl.SSLContext) -> None:
    missing = server.complete(prompt="a", max_tokens=1)
    assert (missing.status_code, missing.json()["error"]["code"]) == (401, 401)
    assert missing.json()["error"]["type"] == "AuthenticationError"
    assert missing.headers["www-authenticate"] == "Bearer"
    wrong = ["wrong", "é", "from-the-fil", "from-the-filee", "from-the"]
    for key, status in [*((key, 401) for key in wrong), ("from-the-file", 200), ("from-the-environment", 200)]:
        answer = server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert answer.status_code == status, key
    for path in ("/server_info", "/debug/ranks", "/load", "/tokenize", "/nothing"):
        assert server.http.get(path).status_code == 401, path
    for path in ("/health", "/live", "/metrics", "/version"):
        assert server.http.get(path).status_code == 200, path
    http = httpx2.Client(verify=context)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", http_client=http)
    with client, pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        client.models.list()


def check_clients(server: ServerProcess) -> None:
    """Each key has its limits, and reads only what it has written to the prefix cache itself."""
    cached = {}
    for key in ("from-the-file", "from-the-environment", "from-the-file"):
        body = {"prompt": list(range(1, 101)), "max_tokens": 1, "n": 2}
        answer = server.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert ("x-ratelimit-remaining-requests" in answer.headers) == (key == "from-the-file")
        cached.setdefault(key, []).append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached["from-the-environment"][0] == cached["from-the-file"][0] < cached["from-the-file"][1]
    file, environment = ({"Authorization": f"Bearer {key}"} for key in ("from-the-file", "from-the-environment"))
    body |= {"n": 1, "seed": 5, "logprobs": 3}
    choices = [
        server.http.post("/v1/completions", json=body, headers=key).json()["choices"] for key in (file, environment)
    ]
    assert choices[0] == choices[1]
    assert "may have 2 at a time" in server.http.post("/v1/completions", json=body | {"n": 3}, headers=file).text
    while (answer := server.http.post("/tokenize", json={"prompt": "a"}, headers=file)).status_code == 200:
        pass
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "RateLimitError")
    assert 1 <= int(answer.headers["retry-after"]) <= 2
    assert server.http.post("/tokenize", json={"prompt": "a"}, headers=environment).status_code == 200
    figures = server.http.get("/metrics").text
    assert 'vllm:api_key_refusals_total{api_key="file",model_name="a"} 1.0' in figures
    assert 'vllm:api_key_tokens_total{api_key="key-1",model_name="a"} 203.0' in figures


def test_health_names_the_rank(tmp_path: Path) -> None:
    """A stopped worker, one of two, is named; once it goes on, all is well again."""
    flags = ("--data-parallel-size", "2", "--heartbeat-interval-s", "0.05", "--num-threads", "1")
    with ServerProcess(tmp_path / "log", *flags) as server:
        assert server.http.get("/health").status_code == 200
        [second] = [
            worker for worker in server.workers() if worker.cmdline()[worker.cmdline().index("--rank") + 1] == "1"
        ]
        second.send_signal(signal.SIGSTOP)
        while (answer := server.http.get("/health")).status_code == 200:
            time.sleep(0.05)
        second.send_signal(signal.SIGCONT)
        assert answer.status_code == 503
        assert [problem["rank"] for problem in answer.json()["problems"]] == [1]
        assert "worker 1" in answer.json()["problems"][0]["reason"]
        while server.http.get("/health").status_code != 200:
            time.sleep(0.05)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sempre.engine", "serve", *arguments], capture_output=True, text=True, timeout=60
    )


def test_settings_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag comes before the environment, that before the file; what is printed can be read again."""
    file = tmp_path / "serve.yaml"
    file.write_text("model: tiny\nport: 1\nmax-num-seqs: 7\nkv-cache-dtype: auto\nhost: ::1\napi_key: [hidden]\n")
    monkeypatch.setenv("SEMPRE_PORT", "2")
    monkeypatch.setenv("SEMPRE_HOST", "127.0.0.9")
    assert main(["serve", "--config", str(file), "--print-config", "--port", "3"]) == 0
    printed = capsys.readouterr().out
    assert "hidden" not in printed
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    for name in ("PORT", "HOST"):
        monkeypatch.delenv(f"SEMPRE_{name}")
    assert main(["serve", "--config", str(again), "--print-config"]) == 0
    second = capsys.readouterr().out
    assert second == "".join(line for line in printed.splitlines(True) if not line.startswith("#"))
    for line in ("port: 3", "host: 127.0.0.9", "max_num_seqs: 7", "model: tiny"):
        assert line in second.splitlines()


@pytest.mark.parametrize("where", ["flags", "file"])
def test_short_flags_of_speculation(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They reach the engine, and what is printed of them can be read again."""
    file = tmp_path / "serve.yaml"
    file.write_text("spec-model: tiny-draft\nspec_tokens: 3\n" if where == "file" else "")
    flags = ["--spec-model", "tiny-draft", "--spec-tokens", "3"] if where == "flags" else []
    assert main(["serve", "tiny", "--config", str(file), "--print-config", *flags]) == 0
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed)["speculative_config"]
    assert (shown["method"], shown["model"], shown["num_speculative_tokens"]) == ("draft_model", "tiny-draft", 3)
    file.write_text(printed)
    assert main(["serve", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model given"),
        (("tiny", "--prot", "1"), "--port"),
        (("tiny", "--port", "70000"), "port"),
        (("tiny", "--ssl-keyfile", "k"), "ssl_certfile"),
        (("tiny", "--api-key-file", "/nothing"), "api_key_file"),
        (("tiny", "--ssl-keyfile", "/nothing", "--ssl-certfile", "/nothing"), "ssl_keyfile /nothing cannot be read"),
        (("tiny", "--ssl-keyfile", __file__, "--ssl-certfile", __file__), "no certificate and its key"),
        (("tiny", "--config", "/nothing"), "/nothing"),
        (
            ("tiny", "--kv-cache-dtype", "fp4"),
            "--kv-cache-dtype: invalid choice: 'fp4' (choose from 'auto', 'fp8', 'fp8_e4m3')",
        ),
        (("tiny", "--calculate-kv-scales"), "calculate_kv_scales=True is not supported by this engine"),
        (("tiny", "--no-enable-chunked-prefill"), "enable_chunked_prefill=False is not supported by this engine"),
        (("tiny", "--data-parallel-size", "0"), "data_parallel_size must be at least 1"),
        (("tiny", "--api-server-count", "0"), "api_server_count"),
        *(
            (("tiny", "--api-server-count", "2", *flags), f"{name} cannot be used with api_server_count 2")
            for name, flags in {
                "on_engine_death": ("--on-engine-death", "restart"),
                "enable_sleep_mode": ("--enable-sleep-mode",),
                "multiprocessing": ("--no-multiprocessing",),
            }.items()
        ),
    ],
)
def test_refused_settings(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-model-len", "99999"), "max_model_len: expected 1 to 2048"),
        (("--block-size", "7"), "block_size: a CPU has blocks of 16 tokens only"),
        (("--kv-cache-memory-bytes", "1k"), "kv_cache_memory_bytes: one sequence of max_model_len=2048"),
    ],
)
def test_a_setting_that_the_model_refuses_is_never_said_to_be_served(flags: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "sempre.engine", "serve", "tiny", "--host", "127.0.0.1", "--port", "0", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert message in result.stderr
    assert "listening" not in result.stderr


def test_the_address_is_told_when_it_answers(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", *FLAGS) as server:
        assert f"listening on {server.url}" in server.log
        assert server.log.splitlines()[-1].endswith(f"the page is at {server.url}/")
        assert "anyone who can reach" not in server.log


def test_a_number_in_a_file_must_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text('data_parallel_size: "2"\n')
    assert main(["serve", "tiny", "--config", str(file), "--print-config"]) == 2
    assert "data_parallel_size must be an int, got '2'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "host: ::1\n# more\nmax-num-seq: 3\n",
            "{file}, line 3: there is no setting 'max_num_seq'. Did you mean 'max_num_seqs'?",
        ),
        ("port: 1\nhost: ::1\nport: 2\n", "{file}, line 3: 'port' is set twice, first in {file}, line 1"),
        ("host: ::1\nport: 70000\n", "{file}, line 2: port"),
        ("\n\ndata_parallel_size: 0\n", "{file}, line 3: data_parallel_size must be at least 1"),
        ("calculate-kv-scales: true\n", "{file}, line 1: calculate_kv_scales=True is not supported by this engine"),
    ],
)
def test_an_error_of_a_file_names_its_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert main(["serve", "tiny", "--config", str(file), "--print-config"]) == 2
    assert message.replace("{file}", str(file)) in capsys.readouterr().err


def test_a_flag_that_overrides_a_file_is_not_said_to_stand_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\n")
    assert main(["serve", "tiny", "--config", str(file), "--print-config", "--port", "70000"]) == 2
    assert str(file) not in capsys.readouterr().err


def test_a_key_for_vllm_is_not_taken_for_one(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", *FLAGS, environment={"VLLM_API_KEY": "hidden"}) as server:
        assert "VLLM_API_KEY is ignored, so requests need no key; set SEMPRE_API_KEY" in server.log
        assert "hidden" not in server.log


def test_an_address_in_use_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = run_cli("tiny", "--host", "127.0.0.1", "--port", str(other.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr
