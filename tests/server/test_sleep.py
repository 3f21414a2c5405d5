"""Sleeping over HTTP: requests that come meanwhile wait, and get the bits of a server that never slept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess

BODY: dict[str, Any] = {"model": "tiny", "prompt": "It is a truth", "max_tokens": 12, "seed": 3, "logprobs": 2}


def test_a_server_that_does_not_allow_it(server: ServerProcess) -> None:
    for method, path in (("POST", "/sleep"), ("POST", "/pause"), ("GET", "/is_sleeping")):
        found = server.http.request(method, path)
        assert (found.status_code, "--enable-sleep-mode" in found.text) == (404, True)


@pytest.mark.product
def test_requests_that_come_meanwhile_wait(tmp_path: Path) -> None:
    flags = ("--max-model-len", "256", "--num-threads", "1", "--enable-sleep-mode")
    with ServerProcess(tmp_path / "log", *flags) as server, ThreadPoolExecutor(1) as pool:

        def post(path: str, **query: Any) -> Any:
            found = server.http.post(path, params=query)
            assert found.status_code == 200, found.text
            return found.json()

        def choices() -> Any:
            return server.http.post("/v1/completions", json=BODY, timeout=60).json()["choices"]

        expected = choices()
        for ways in (
            [("/sleep", {"level": 2}), ("/wake_up", {"tags": ["weights"]}), ("/wake_up", {"tags": ["kv_cache"]})],
            [("/sleep", {}), ("/wake_up", {})],
            [("/pause", {"mode": "keep"}), ("/resume", {})],
        ):
            (path, query), *others = ways
            assert post(path, **query)["status"] in ("sleeping", "paused")
            assert server.http.get("/is_paused").json() == {"is_paused": True}
            assert server.http.get("/health").status_code == 200
            waiting = pool.submit(choices)
            for path, query in others:
                assert not waiting.done()
                post(path, **query)
            assert waiting.result() == expected
            assert server.http.get("/is_sleeping").json() == {"is_sleeping": False}
        for path, query, text in (
            ("/sleep", {"level": "3"}, "level must be 0, 1 or 2"),
            ("/sleep", {"mode": "later"}, "mode must be one of"),
            ("/sleep", {"levle": "1"}, "levle is no parameter of /sleep"),
            ("/wake_up", {"tags": "graphs"}, "tags must be of"),
            ("/pause", {"clear_cache": "perhaps"}, "clear_cache must be true or false"),
        ):
            found = server.http.post(path, params=query)
            assert (found.status_code, text in found.text) == (400, True), found.text
