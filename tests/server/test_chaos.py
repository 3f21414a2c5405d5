"""Streams of a server under random signals to every process, the server too, which a supervisor starts again.

As long as the server lives, no stream breaks; where it was killed itself, the same request sent again gives the answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx2
import psutil
import pytest
from chaos import Chaos
from server_process import ServerProcess

DRAFTING = {
    "method": "draft_model", "model": "tiny-draft", "placement": "worker", "num_speculative_tokens": 3,
    "adaptive": False,
}  # fmt: skip
FLAGS = (
    *("--data-parallel-size", "2", "--num-threads", "1", "--max-model-len", "256", "--max-num-batched-tokens", "128"),
    *("--speculative-config", json.dumps(DRAFTING), "--max-restarts", "100000", "--max-request-crashes", "100000"),
    *("--heartbeat-interval-s", "0.2", "--heartbeat-timeout-s", "2.5", "--no-enable-access-log"),
)
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "


class Supervisor:
    """Keeps a server running; `server` is the present one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._ended = threading.Event()
        self.num_restarts = 0
        self.server = self._start()
        self._thread = threading.Thread(target=self._run, name="supervisor")

    def _start(self) -> ServerProcess:
        return ServerProcess(self._folder / f"log-{next(self._numbers)}", *FLAGS)

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            if self.server.process.poll() is not None:
                self.num_restarts += 1
                self.server = self._start()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        family = psutil.Process(self.server.process.pid).children(recursive=True)
        self.server.__exit__(None, None, None)
        assert not psutil.wait_procs(family, timeout=5)[1]


def make_bodies(count: int, seed: int) -> list[dict[str, Any]]:
    drawn = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "logprobs": 3},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 0},
        {"temperature": 0.8, "stop": ["ee", "zz"], "min_tokens": 4, "logprobs": 1},
        {"temperature": 1.0, "n": 2, "logprobs": 1},
    ]
    return [
        {
            "prompt": TEXT[: drawn.randint(4, len(TEXT))],
            "seed": drawn.randrange(1000),
            "max_tokens": drawn.randint(4, 40),
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **drawn.choice(kinds),
        }
        for _ in range(count)
    ]


class Broken(Exception):
    """A stream did not come to its end, or did not begin."""


async def read(http: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> list[Any]:
    """The choices of one stream, joined."""
    parts: dict[int, list[Any]] = {index: ["", [], [], None] for index in range(body.get("n", 1))}
    try:
        async with http.stream("POST", url + "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Broken(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    except httpx2.TransportError as error:
        raise Broken(repr(error)) from error
    if lines[-1:] != ["[DONE]"]:
        raise Broken("the stream has no end")
    for line in lines[:-1]:
        event = json.loads(line)
        if "error" in event:
            raise Broken(line)
        for choice in event["choices"]:
            part = parts[choice["index"]]
            part[0] += choice["text"]
            part[1] += choice["token_ids"] or []
            part[2] += (choice["logprobs"] or {}).get("token_logprobs") or []
            part[3] = choice["finish_reason"] or part[3]
    return [*parts.values()]


async def was_killed(server: ServerProcess) -> bool:
    """Whether it was, so lately that it may still be about to end."""
    for _ in range(1000):
        if server.process.poll() is not None:
            return server.process.returncode == -9
        await asyncio.sleep(0.01)
    return False


async def run_all(
    supervisor: Supervisor, bodies: list[dict[str, Any]], concurrency: int, answers: list[Any], pause_s: float = 0.0
) -> None:
    answers += [None] * len(bodies)
    waiting: Iterator[tuple[int, dict[str, Any]]] = iter(enumerate(bodies))
    async with httpx2.AsyncClient(timeout=300.0) as http:

        async def work() -> None:
            for number, body in waiting:
                while answers[number] is None:
                    server = supervisor.server
                    try:
                        answers[number] = await read(http, server.url, body)
                    except Broken:
                        # only for the death of the server itself
                        if not await was_killed(server):
                            raise
                        while supervisor.server is server:
                            await asyncio.sleep(0.05)
                await asyncio.sleep(pause_s)

        await asyncio.gather(*(work() for _ in range(concurrency)))


def check(folder: Path, num_requests: int, *, seed: int, concurrency: int, pauses_s: tuple[float, float]) -> Chaos:
    """`pauses_s`: of each client between two requests, and the mean of those between two faults."""
    bodies = make_bodies(num_requests, seed)
    pause_s, mean_pause_s = pauses_s
    with Supervisor(folder) as supervisor:
        expected: list[Any] = []
        found: list[Any] = []
        other: list[Any] = []
        asyncio.run(run_all(supervisor, bodies, concurrency, expected))
        chaos = Chaos(
            lambda: supervisor.server.process.pid,
            lambda: len(found) - found.count(None),
            seed=seed,
            mean_pause_s=mean_pause_s,
            launcher=num_requests > 100,
        )
        with chaos:
            asyncio.run(run_all(supervisor, bodies, concurrency, found, pause_s))
        differing = [number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
        assert differing == []
        # the control: what is compared does differ where the seed does
        sampled = next(body for body in bodies if body["temperature"] == 1.0 and body["max_tokens"] > 8)
        asyncio.run(run_all(supervisor, [{**sampled, "seed": 9999}], 1, other))
        assert other[0] not in expected
        restarts = supervisor.num_restarts
    counts = dict(sorted(chaos.counts.items()))
    print(f"{num_requests} streams, {chaos.num_faults} faults, {restarts} new servers: {counts}")
    return chaos


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_few_streams_under_random_signals(tmp_path: Path) -> None:
    assert check(tmp_path, 16, seed=1, concurrency=8, pauses_s=(0.3, 0.7)).num_faults >= 3


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_streams_under_random_signals(tmp_path: Path) -> None:
    assert check(tmp_path, 1000, seed=2, concurrency=16, pauses_s=(1.0, 3.0)).num_faults >= 50
