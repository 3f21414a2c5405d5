"""A real `sempre serve` in its own process, for tests of what clients see."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2
import psutil

START_S = 120.0


class ServerProcess:
    """Ready once constructed; ends with the context. `log` is what it has written so far."""

    def __init__(
        self,
        log_path: Path,
        *flags: str,
        model: str = "tiny",
        environment: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | ssl.SSLContext = True,
        scheme: str = "http",
        program: Sequence[str] = ("-m", "sempre.engine", "serve"),
    ) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, *program, model, "--host", "127.0.0.1", "--port", "0", *flags],
                stderr=log_file,
                stdout=log_file,
                env={**os.environ, **(environment or {})},
            )
        self.port = self._port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.http = httpx2.Client(base_url=self.url, timeout=60.0, headers=dict(headers or {}), verify=verify)
        self._wait(lambda: self.http.get("/ready").status_code == 200, "ready")

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def complete(self, **fields: object) -> httpx2.Response:
        return self.http.post("/v1/completions", json=fields)

    def load(self) -> dict[str, object]:
        found: dict[str, object] = self.http.get("/load").json()
        return found

    def wait_until_idle(self) -> None:
        """Wait until neither server nor coordinator has a request."""
        self._wait(lambda: not self.load()["num_sequences"] and not any(self._gauges("num_requests_")), "idle")

    def workers(self) -> list[psutil.Process]:
        everybody = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in everybody if any("sempre.workers" in word for word in child.cmdline())]

    def family_rss(self) -> int:
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(member.memory_info().rss for member in family)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.terminate()
            self.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _gauges(self, prefix: str) -> list[float]:
        return [value for name, values in self.load().items() if name.startswith(prefix) for value in values]  # type: ignore[attr-defined]

    def _port(self) -> int:
        self._wait(lambda: "starting on" in self.log, "starting")
        match = re.search(r"starting on \w+://[^:]+:(\d+)", self.log)
        assert match is not None
        return int(match[1])

    def _wait(self, condition: object, what: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():  # type: ignore[operator]
            assert self.process.poll() is None, f"the server ended: {self.log}"
            if time.monotonic() > deadline:
                self.process.kill()  # nobody else would
                raise AssertionError(f"the server is not {what}: {self.log}")
            time.sleep(0.02)
