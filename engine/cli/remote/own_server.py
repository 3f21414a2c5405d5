"""A command's own server, on a private Unix socket, stopped at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sempre.engine.arguments import field_types
from sempre.engine.cli.serve import ENVIRONMENT_PREFIX
from sempre.engine.server.config import ServerConfig
from sempre.ipc.errors import StartupError
from sempre.ipc.liveness import bound

_PAUSE_S = 0.05
_STOP_TIMEOUT_S = 60.0


@contextmanager
def own_server(model: str, engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield the socket path of a ready server. Raises StartupError with the server's last log line."""
    with tempfile.TemporaryDirectory(prefix="sempre-") as folder:
        socket = os.path.join(folder, "http.sock")
        log = os.path.join(folder, "server.log")
        command = [sys.executable, "-m", "sempre.engine", "serve", model, "--uds", socket, "--no-enable-access-log"]
        with open(log, "wb") as standard_error:
            process = subprocess.Popen(
                bound([*command, *as_flags(engine)]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=standard_error,
                env=_environment(),
                # Ctrl-C must reach only this process, which stops the server below.
                start_new_session=True,
            )
        try:
            _wait_until_ready(process, socket, log)
            yield socket
        finally:
            _stop(process)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        written = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{written}" if value else f"--no-{written}")
        elif isinstance(value, list):
            flags.append(f"--{written}={','.join(map(str, value))}")
        elif isinstance(value, dict):
            flags.append(f"--{written}={json.dumps(value)}")
        else:
            flags.append(f"--{written}={value}")
    return flags


def _environment() -> dict[str, str]:
    """Return the environment without settings of servers: keys, ports and TLS are not meant for this one."""
    theirs = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in (*field_types(ServerConfig), "config")}
    return {name: value for name, value in os.environ.items() if name not in theirs}


def _wait_until_ready(process: subprocess.Popen[bytes], socket: str, log: str) -> None:
    import httpx

    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://sempre", timeout=10.0) as client:
        while process.poll() is None:
            try:
                if client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(_PAUSE_S)
    with open(log, encoding="utf-8", errors="replace") as file:
        words = file.read().strip().splitlines() or ["no output"]
    raise StartupError(f"the server ended with code {process.returncode}: {words[-1]}", cause="\n".join(words))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
