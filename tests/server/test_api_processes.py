"""Several API processes in front of one engine answer as one would, and end one by one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from server_process import ServerProcess

FLAGS = ("--max-model-len", "256", "--max-num-seqs", "8", "--num-threads", "1", "--seed", "3", "--log-format", "json")
LONG = {"prompt": "The processes", "max_tokens": 200, "ignore_eos": True, "logprobs": 2, "return_token_ids": True}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = (*FLAGS, "--api-server-count", "2", "--enable-log-requests")
    with ServerProcess(tmp_path_factory.mktemp("several") / "log", *flags) as process:
        yield process


def api_processes(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "sempre.engine.server.api_process" in child.cmdline()]


def answerers(server: ServerProcess) -> set[int]:
    """The ids of the processes that have answered, from the ids of the engine's requests."""
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return {int(line["engine_request_id"].split("-")[0]) for line in lines if "engine_request_id" in line}


def post(server: ServerProcess, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Over a connection of its own, which any of the processes may accept."""
    answer = httpx2.post(server.url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def stream(server: ServerProcess, body: dict[str, Any]) -> tuple[list[int], list[Any]] | None:
    """Token ids and log-probabilities; None for a stream that breaks off."""
    token_ids: list[int] = []
    logprobs: list[Any] = []
    try:
        with httpx2.stream("POST", server.url + "/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return token_ids, logprobs
                if line.startswith("data: "):
                    [choice] = json.loads(line.removeprefix("data: "))["choices"]
                    token_ids += choice["token_ids"]
                    logprobs += choice["logprobs"]["token_logprobs"]
    except httpx2.TransportError:
        pass
    return None


def count_of(server: ServerProcess) -> float:
    prefix = "sempre:e2e_request_latency_seconds_count"
    [line] = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith(prefix)]
    return float(line.split()[-1])


@pytest.mark.product
def test_requests_get_the_bits_of_one_process_whoever_answers(several: ServerProcess, server: ServerProcess) -> None:
    """Also those without a seed, which are counted together: equal requests get the seeds of one process, in order."""
    bodies = [
        {"prompt": "Counted together", "max_tokens": 8, "logprobs": 2, "return_token_ids": True, **fields}
        for fields in ({"temperature": 0}, {"seed": 7}, {}, {}, {"n": 2}, {}, {}, {}, {})
    ]
    assert [post(several, body) for body in bodies] == [post(server, body) for body in bodies]
    before = count_of(several)
    body = {"prompt": "At the same time", "max_tokens": 8}
    with ThreadPoolExecutor(16) as threads:
        seeds = [one["seed"] for [one] in threads.map(lambda _: post(several, body), range(48))]
    # the order of arrival is not known
    assert sorted(seeds) == sorted(post(server, body)[0]["seed"] for _ in range(48))
    assert answerers(several) == {process.pid for process in api_processes(several)}
    assert count_of(several) == before + 48


@pytest.mark.product
def test_the_death_of_one_process_aborts_only_its_requests(several: ServerProcess) -> None:
    alone = [stream(several, LONG | {"seed": seed}) for seed in range(8)]
    first, second = api_processes(several)
    num_done = count_of(several)
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(stream, several, LONG | {"seed": seed}) for seed in range(8)]
        while several.load()["server_load"] != 8:
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGKILL)
        found = [each.result() for each in running]
    assert {str(outcome) for outcome, whole in zip(found, alone, strict=True) if outcome != whole} <= {"None"}
    assert 0 < found.count(None) < 8, "each had some of the requests"
    several.wait_until_idle()
    while len(api_processes(several)) < 2 or answerers(several) <= {first.pid, second.pid}:
        post(several, {"prompt": "a", "max_tokens": 1})
    assert psutil.pid_exists(second.pid)
    # what the dead process has counted stays
    assert count_of(several) > num_done
    assert [stream(several, LONG | {"seed": seed}) for seed in range(2)] == alone[:2]


@pytest.mark.product
def test_requests_of_all_processes_continue_with_a_new_engine(several: ServerProcess) -> None:
    alone = [stream(several, LONG | {"seed": seed}) for seed in range(6)]
    processes = {process.pid for process in api_processes(several)}
    [coordinator] = [
        child
        for child in psutil.Process(several.process.pid).children()
        if "sempre.engine.coordinator" in child.cmdline()
    ]
    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(stream, several, LONG | {"seed": seed}) for seed in range(6)]
        while several.load()["server_load"] != 6:
            time.sleep(0.01)
        coordinator.kill()
        assert [each.result() for each in running] == alone
    assert {process.pid for process in api_processes(several)} == processes
    assert not psutil.pid_exists(coordinator.pid)


@pytest.mark.product
def test_all_processes_drain(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", *FLAGS, "--api-server-count", "2") as server:
        alone = stream(server, LONG | {"seed": 1})
        with ThreadPoolExecutor(4) as threads:
            running = [threads.submit(stream, server, LONG | {"seed": 1}) for _ in range(4)]
            while server.load()["server_load"] != 4:
                time.sleep(0.01)
            family = psutil.Process(server.process.pid).children(recursive=True)
            server.terminate()
            assert [each.result() for each in running] == [alone] * 4
        assert server.process.wait(30) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
