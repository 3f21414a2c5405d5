"""When the engine has ended: a supervisor is told by the exit code, or clients by 503 until a new engine is ready."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_process import ServerProcess

FLAGS = ("--max-model-len", "2048", "--num-threads", "1", "--max-restarts", "0", "--no-enable-access-log")
LONG: dict[str, Any] = {"prompt": "It is a truth", "max_tokens": 1500, "ignore_eos": True, "seed": 1}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 12, "logprobs": 2}
MOST_LOG_BYTES = 20_000


def kill_worker_under_load(server: ServerProcess) -> tuple[Any, Any]:
    """Kill it during a whole and a streamed answer; returns both answers."""
    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(server.complete, **LONG)
        streamed = threads.submit(server.complete, **LONG, stream=True)
        while server.load()["num_sequences"] != 2:
            time.sleep(0.01)
        server.workers()[0].kill()
        return whole.result(), streamed.result()


def check_told(whole: Any, streamed: Any) -> None:
    assert whole.status_code == 503
    assert int(whole.headers["retry-after"]) >= 1
    assert "worker 0" in whole.json()["error"]["message"]
    *_, last, done = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert (json.loads(last)["error"]["code"], done) == (503, "[DONE]")


def test_the_server_ends_with_its_engine(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", *FLAGS) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        check_told(*kill_worker_under_load(server))
        assert server.process.wait(30) == 4
        assert not psutil.wait_procs(family, timeout=5)[1]
    assert server.log.count("the engine has ended: worker 0") == 1
    assert len(server.log) < MOST_LOG_BYTES


@pytest.mark.timeout(600)
def test_the_server_starts_its_engine_again(tmp_path: Path) -> None:
    """Requests in the meantime are told when to retry, and messages about them do not pile up."""
    with ServerProcess(tmp_path / "log", *FLAGS, "--on-engine-death", "restart") as server:
        expected = server.complete(**SHORT).json()["choices"]
        check_told(*kill_worker_under_load(server))
        num_refused = 0
        while (answer := server.complete(**SHORT)).status_code != 200:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert server.http.get("/live").status_code == 200
            num_refused += 1
            time.sleep(0.02)
        assert num_refused >= 5
        assert answer.json()["choices"] == expected
        assert server.http.get("/health").json()["status"] == "healthy"
        assert len(server.log) < MOST_LOG_BYTES
        server.terminate()
        assert server.process.wait(60) == 0
