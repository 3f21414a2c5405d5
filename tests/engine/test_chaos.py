"""Requests under random signals to every process of the engine: none is lost, doubled, changed, or hangs.

Two replicas with a draft worker each; in this process and, see tests/server/test_chaos.py, over HTTP.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from chaos import Chaos

from sempre.engine import AsyncLLM, RequestOutputKind, SamplingParams
from sempre.engine.client.process import ProcessClientBase

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "data_parallel_size": 2,
    "num_threads": 1,
    "max_model_len": 256,
    "max_num_batched_tokens": 128,
    "speculative_config": {
        "method": "draft_model", "model": "tiny-draft", "placement": "worker", "num_speculative_tokens": 3,
        "adaptive": False,
    },
    "heartbeat_interval_s": 0.2,
    "heartbeat_timeout_s": 2.5,
    # both budgets are to hold
    "max_restarts": 100_000,
    "max_request_crashes": 100_000,
}  # fmt: skip
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
Request = tuple[str, SamplingParams]


def make_requests(count: int, seed: int) -> list[Request]:
    drawn = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "logprobs": 3},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 0},
        {"temperature": 1.0, "prompt_logprobs": 2, "logprobs": 1},
        {"temperature": 0.8, "stop": ["ee", "zz"], "min_tokens": 4, "logprobs": 1},
        {"temperature": 1.0, "n": 2, "logprobs": 1},
    ]
    return [
        (
            TEXT[: drawn.randint(4, len(TEXT))],
            SamplingParams(
                seed=drawn.randrange(1000),
                max_tokens=drawn.randint(4, 40),
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
                **drawn.choice(kinds),
            ),
        )
        for _ in range(count)
    ]


async def read(engine: AsyncLLM, prompt: str, params: SamplingParams) -> list[Any]:
    """All that a client sees of a request, joined; a delta that came twice would be in it twice."""
    prompt_logprobs: Any = None
    parts: dict[int, list[Any]] = {index: ["", [], [], None] for index in range(params.n)}
    async for output in engine.generate(prompt, params):
        if output.prompt_logprobs is not None:
            prompt_logprobs = output.prompt_logprobs
        for choice in output.outputs:
            part = parts[choice.index]
            part[0] += choice.text
            part[1] += choice.token_ids
            part[2] += choice.logprobs or []
            part[3] = (choice.finish_reason, choice.stop_reason, choice.seed, choice.error)
    return [prompt_logprobs, parts]


async def run_all(
    engine: AsyncLLM, requests: list[Request], concurrency: int, answers: list[Any], pause_s: float = 0.0
) -> None:
    answers += [None] * len(requests)
    waiting: Iterator[tuple[int, Request]] = iter(enumerate(requests))

    async def work() -> None:
        for number, request in waiting:
            assert answers[number] is None
            answers[number] = await read(engine, *request)
            await asyncio.sleep(pause_s)

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def disturbed(num_requests: int, *, seed: int, concurrency: int, pause_s: float, mean_pause_s: float) -> Chaos:
    requests = make_requests(num_requests, seed)
    async with AsyncLLM("tiny", **SETTINGS) as engine:
        expected: list[Any] = []
        found: list[Any] = []
        await run_all(engine, requests, concurrency, expected)
        client = engine._client
        assert isinstance(client, ProcessClientBase)
        # this engine alone: other tests may have processes below this one, too
        chaos = Chaos(
            lambda: client.process.child.pid,
            lambda: len(found) - found.count(None),
            seed=seed,
            mean_pause_s=mean_pause_s,
        )
        with chaos:
            await run_all(engine, requests, concurrency, found, pause_s)
        differing = [number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
        assert differing == []
        # the control: what is compared does differ where the seed does
        prompt = next(text for text, params in requests if params.temperature and (params.max_tokens or 0) > 8)
        other = await read(engine, prompt, SamplingParams(temperature=1.0, seed=9999, max_tokens=40, logprobs=1))
        assert other not in expected
        assert engine._frontend.processor.num_unfinished == 0
    print(f"{num_requests} requests, {chaos.num_faults} faults: {dict(sorted(chaos.counts.items()))}")
    return chaos


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert not psutil.wait_procs(left, timeout=5)[1]


@pytest.mark.timeout(600)
def test_a_few_requests_under_random_signals() -> None:
    run = disturbed(12, seed=1, concurrency=6, pause_s=0.3, mean_pause_s=0.7)
    assert asyncio.run(run).num_faults >= 3


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_requests_under_random_signals() -> None:
    run = disturbed(1000, seed=2, concurrency=16, pause_s=0.4, mean_pause_s=0.8)
    assert asyncio.run(run).num_faults >= 50
