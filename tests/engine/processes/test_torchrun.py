"""torchrun on two hosts, here both this machine, starts one engine with the bits of one worker."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

START_S = 90.0
WORK = ["--temperature", "0", "--max-tokens", "32", "--logprobs", "1", "--json", "The ship"]


def free_ports(count: int) -> list[int]:
    with ExitStack() as at_the_end:
        probes = [at_the_end.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def logprobs_alone(profile: str) -> list[float]:
    command = [sys.executable, "-m", "sempre.engine", "generate", "--model", "tiny", "--numerics-profile", profile]
    [line] = subprocess.check_output([*command, *WORK], text=True).splitlines()
    return [place[0]["logprob"] for place in json.loads(line)["logprobs"]]


@pytest.mark.product
def test_torchrun_starts_one_engine(tmp_path: Path) -> None:
    """The same command on both; the variables of torchrun say which host is which."""
    rendezvous, nodes, port = free_ports(3)
    torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    serve = [sys.executable, "-m", "sempre.engine", "serve", "tiny", "-tp", "2", "--port", str(port)]
    serve += ["--node-key-file", str(tmp_path / "keys"), "--master-port", str(nodes)]
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as at_the_end:
        for rank in range(2):
            words = [*torchrun, "--node-rank", str(rank), "--master-port", str(rendezvous), "--no-python", *serve]
            log = at_the_end.enter_context((tmp_path / f"{rank}.log").open("w"))
            process = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log)
            at_the_end.callback(process.wait)
            at_the_end.callback(process.terminate)
        deadline = time.monotonic() + START_S
        while not _is_healthy(url):
            assert time.monotonic() < deadline, (tmp_path / "0.log").read_text()
            time.sleep(0.2)
        body = {"model": "tiny", "prompt": "The ship", "temperature": 0, "max_tokens": 32, "logprobs": 1}
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60.0)
        assert "node 1 of 2" in (tmp_path / "0.log").read_text()
    found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert found == logprobs_alone("tree8") != logprobs_alone("single")


def _is_healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx2.TransportError:
        return False
