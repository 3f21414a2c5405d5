"""The engine beneath a server is replaced while streams run: none breaks, and every bit is what it would have been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from server_process import ServerProcess

from sempre.engine.models import resolve_model

FLAGS = ("--max-num-seqs", "32", "--num-threads", "1", "--seed", "3", "--kv-cache-memory-bytes", "256M")
NUM_STREAMS = 32
NUM_RESTARTS = 2
Found = list[tuple[Any, ...]]


def request(seed: int) -> dict[str, Any]:
    """Prompts with a common beginning, and every second one without a temperature."""
    return {
        "prompt": f"The ship that left {'Nantucket in the morning ' * (seed % 5)}with {seed} men",
        "max_tokens": 900,
        "ignore_eos": True,
        "logprobs": 1,
        "temperature": seed % 2,
        "seed": seed,
        "stream": True,
        "return_token_ids": True,
    }


def stream(url: str, seed: int) -> Found:
    """Each token of a stream with its log-probabilities, up to the end that the server marks."""
    found: Found = []
    with httpx2.stream("POST", url + "/v1/completions", json=request(seed), timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return found
            if line.startswith("data: "):
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                logprobs = choice["logprobs"]
                found += zip(choice["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    raise AssertionError("the stream ended without [DONE]")


def streams(url: str, meanwhile: Callable[[], None] = lambda: None) -> list[Found]:
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        running = [threads.submit(stream, url, seed) for seed in range(NUM_STREAMS)]
        meanwhile()
        return [each.result() for each in running]


def coordinator(server: ServerProcess) -> psutil.Process:
    """The one that has been there longest."""
    children = psutil.Process(server.process.pid).children()
    found = [child for child in children if "sempre.engine.coordinator" in child.cmdline()]
    return min(found, key=psutil.Process.create_time)


def wait_for(condition: Callable[[], bool], server: ServerProcess) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


def replace_engine(server: ServerProcess, ending: str = "the engine was replaced") -> None:
    done = server.log.count(ending)
    server.process.send_signal(signal.SIGUSR2)
    wait_for(lambda: server.log.count(ending) > done, server)


@pytest.fixture(scope="module", params=["", "stop-first", "2 API processes"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    more = {"": (), "stop-first": ("--restart-order", "stop-first"), "2 API processes": ("--api-server-count", "2")}
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", *FLAGS, *more[request.param]) as process:
        yield process


@pytest.mark.product
def test_streams_continue_over_two_restarts(server: ServerProcess) -> None:
    alone = streams(server.url)
    assert len({str(each) for each in alone}) == NUM_STREAMS, "control: another seed or prompt is another stream"
    former = [coordinator(server)]
    probes: list[int] = []

    def restart() -> None:
        wait_for(lambda: server.load()["server_load"] == NUM_STREAMS, server)
        ended = threading.Event()
        with ThreadPoolExecutor(1) as probing:
            probing.submit(probe, server.url, ended, probes)
            for _ in range(NUM_RESTARTS):
                replace_engine(server)
                assert server.load()["server_load"] == NUM_STREAMS, "the restart comes too late to find streams at work"
                former.append(coordinator(server))
            ended.set()

    assert streams(server.url, restart) == alone
    assert len({process.pid for process in former}) == 1 + NUM_RESTARTS
    assert not any(process.is_running() for process in former[:-1])
    if "stop-first" not in server.process.args:  # type: ignore[operator]
        assert set(probes) == {200}, "a server whose engine starts first is healthy all the time"


def probe(url: str, ended: threading.Event, statuses: list[int]) -> None:
    while not ended.wait(0.05):
        statuses.append(httpx2.get(url + "/health", timeout=30).status_code)


@pytest.mark.product
def test_no_folder_is_left(tmp_path: Path) -> None:
    flags = (*FLAGS, "--api-server-count", "2")
    with ServerProcess(tmp_path / "log", *flags, environment={"XDG_RUNTIME_DIR": str(tmp_path)}) as process:
        replace_engine(process)
        replace_engine(process)
        assert len(list(tmp_path.glob("sempre-*"))) == 2, "of the API processes, and of the engine"
    assert list(tmp_path.glob("sempre-*")) == []


@pytest.mark.product
def test_an_engine_with_other_weights_is_not_used(tmp_path: Path) -> None:
    """The model's files have changed: the running engine goes on, with the same answers."""
    model = tmp_path / "model"
    shutil.copytree(resolve_model("tiny").path, model)
    body = {"prompt": "The ship", "max_tokens": 24, "seed": 5, "logprobs": 1}
    with ServerProcess(tmp_path / "log", *FLAGS, model=str(model)) as process:
        before, engine = process.complete(**body).json()["choices"], coordinator(process)
        [weights] = model.glob("*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        changed = tmp_path / "changed"
        changed.write_bytes(data)
        os.replace(changed, weights)
        replace_engine(process, "the engine was not replaced")
        assert "differs in fingerprint" in process.log
        assert coordinator(process) == engine
        assert process.complete(**body).json()["choices"] == before
        assert process.http.get("/health").status_code == 200
