"""Killed and stopped processes under load: streams pause, and every bit is what it would have been.

Each run is compared with an undisturbed one on the same engine. The same under the ordinary matmul, whose bits
depend on how rows are batched, must differ: what is computed again is batched differently.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from sempre.engine import (
    LLM,
    AsyncLLM,
    EngineHealth,
    EngineUnhealthy,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    WorkerDied,
)

SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "num_threads": 1,
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 1.5,
    "max_num_batched_tokens": 256,
}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
DELTA = RequestOutputKind.DELTA
LETTERS = StructuredOutputsParams(regex="[a-z ]{120,}")


def mixed_requests() -> list[tuple[str, SamplingParams]]:
    """40 sequences in 36 requests: every kind of sampling and of report, prompts with common beginnings."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "logprobs": 3, "output_kind": DELTA},
        {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 0},
        {"temperature": 1.0, "presence_penalty": 1.0, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.0, "prompt_logprobs": 2, "logprobs": 1},
        {"temperature": 0.8, "stop": ["ee", "zz"], "min_tokens": 12, "logprobs": 1, "output_kind": DELTA},
        {"temperature": 1.1, "min_p": 0.02, "logit_bias": {17: 2.0}, "bad_words": ["the"], "logprobs": 1},
        {"temperature": 0.9, "ignore_eos": False, "logprobs": 1, "structured_outputs": LETTERS},
        {
            "temperature": 0.7,
            "ignore_eos": False,
            "min_tokens": 20,
            "stop": ["he "],
            "include_stop_str_in_output": True,
        },
    ]
    requests = []
    for i in range(34):
        keywords = {"ignore_eos": True, "max_tokens": 44 + 7 * (i % 3), "seed": 1000 + i} | kinds[i % len(kinds)]
        requests.append((TEXT[: 8 + 5 * (i % 20)], SamplingParams(**keywords)))
    for i, output_kind in enumerate((DELTA, RequestOutputKind.CUMULATIVE)):
        siblings = SamplingParams(
            n=3, temperature=1.0, seed=50 + i, max_tokens=50, ignore_eos=True, logprobs=1, output_kind=output_kind
        )
        requests.append((TEXT[:60], siblings))
    return requests


class Reader:
    """Reads one stream and joins what it yields, as a client would."""

    def __init__(self, params: SamplingParams) -> None:
        self.only_new = params.output_kind is DELTA
        self.parts: dict[int, dict[str, Any]] = {}
        self.prompt_logprobs: Any = None
        self.num_outputs = 0

    async def read(self, engine: AsyncLLM, prompt: str, params: SamplingParams) -> Reader:
        async for output in engine.generate(prompt, params):
            self.num_outputs += 1
            self.take(output)
        return self

    def take(self, output: RequestOutput) -> None:
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        for completion in output.outputs:
            old = self.parts.get(completion.index) if self.only_new else None
            part: dict[str, Any] = old or {"text": "", "token_ids": [], "logprobs": []}
            if not self.only_new:
                part = {"text": "", "token_ids": [], "logprobs": []}
            part["text"] += completion.text
            part["token_ids"] = [*part["token_ids"], *completion.token_ids]
            part["logprobs"] = [*part["logprobs"], *(completion.logprobs or [])]
            part["end"] = (completion.finish_reason, completion.stop_reason, completion.seed)
            part["cumulative"] = completion.cumulative_logprob
            self.parts[completion.index] = part

    def result(self) -> tuple[dict[int, dict[str, Any]], Any]:
        return self.parts, self.prompt_logprobs


async def run_mixed(engine: AsyncLLM, disturb: Callable[[], Any] | None = None) -> list[Any]:
    readers = [Reader(params) for _, params in mixed_requests()]
    reading = [
        asyncio.create_task(reader.read(engine, *request))
        for reader, request in zip(readers, mixed_requests(), strict=True)
    ]
    if disturb is not None:
        while not all(sum(len(p["token_ids"]) for p in reader.parts.values()) >= 2 for reader in readers):
            await asyncio.sleep(0.005)
        assert sum(not task.done() for task in reading) >= 32, "the harm comes too late to find requests at work"
        await disturb()
    return [reader.result() for reader in await asyncio.gather(*reading)]


async def until_healthy(engine: AsyncLLM) -> EngineHealth:
    while not (health := await engine.health()).healthy:
        await asyncio.sleep(0.05)
    return health


def coordinator_pid(health: EngineHealth) -> int:
    return psutil.Process(health.workers[0].pid).ppid()


async def harm(engine: AsyncLLM, target: str, number: signal.Signals) -> tuple[EngineHealth, EngineHealth]:
    """Signal a process; the health during the outage and after it."""
    before = await engine.health()
    assert before.healthy
    before.check()
    os.kill(before.workers[0].pid if target == "worker" else coordinator_pid(before), number)
    while (during := await engine.health(timeout_s=0.3)).healthy:
        assert during.workers[0].pid == before.workers[0].pid, "the outage is over before it was looked at"
        await asyncio.sleep(0.01)
    after = await until_healthy(engine)
    assert after.workers[0].pid != before.workers[0].pid
    for worker in before.workers:
        if target != "worker" or worker.rank == 0:
            assert not psutil.pid_exists(worker.pid) or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    return during, after


HARMS = {
    1: [("worker", signal.SIGKILL), ("coordinator", signal.SIGKILL)],
    2: [("worker", signal.SIGSTOP), ("coordinator", signal.SIGKILL)],
}


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.product)])
def test_no_bit_changes_and_health_tells_of_the_outage(replicas: int) -> None:
    async def scenario() -> None:
        async with AsyncLLM("tiny", seed=3, data_parallel_size=replicas, **SETTINGS) as engine:
            undisturbed = await run_mixed(engine)
            for target, number in HARMS[replicas]:
                seen: list[EngineHealth] = []

                async def disturb(target: str = target, number: signal.Signals = number, seen: Any = seen) -> None:
                    seen += await harm(engine, target, number)

                assert await run_mixed(engine, disturb) == undisturbed, (target, number)
                during, after = seen
                (problem, *_) = during.problems
                assert problem.rank == (0 if target == "worker" else None)
                with pytest.raises(EngineUnhealthy, match=target) as error:
                    during.check()
                assert error.value.rank == problem.rank
                assert len(after.workers) == replicas
            assert engine._frontend.processor.num_unfinished == 0

    asyncio.run(scenario())


def test_the_control_shows_a_difference() -> None:
    async def scenario() -> None:
        async with AsyncLLM("tiny", seed=3, numerics="control", **SETTINGS) as engine:
            undisturbed = await run_mixed(engine)

            async def disturb() -> None:
                await harm(engine, "worker", signal.SIGKILL)

            assert await run_mixed(engine, disturb) != undisturbed

    asyncio.run(scenario())


def worker_and_coordinator(others: set[psutil.Process]) -> tuple[psutil.Process, psutil.Process]:
    """Of the one engine that this process has beside `others`."""
    new = set(psutil.Process().children(recursive=True)) - others
    (worker,) = [process for process in new if "sempre.workers" in process.cmdline()]
    parent = worker.parent()
    assert parent is not None
    return worker, parent


def test_the_synchronous_interface_goes_on() -> None:
    prompts = [TEXT[:20], TEXT[:50]]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    others = set(psutil.Process().children(recursive=True))
    with LLM("tiny", seed=3, **SETTINGS) as llm:
        expected = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
        unseeded = SamplingParams(max_tokens=1)
        seeds = [output.outputs[0].seed for output in llm.generate(prompts, unseeded, use_tqdm=False)]
        stream = llm.stream(prompts[0], params)
        for _ in range(5):
            next(stream)
        worker_and_coordinator(others)[1].kill()
        *_, last = stream
        assert last.outputs == expected[0]
        # found dead by the next call
        worker_and_coordinator(others)[0].kill()
        assert [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)] == expected
        worker_and_coordinator(others)[0].kill()
        assert llm.collective_rpc("ping", timeout=60) == ["pong"]
        # equal requests are counted by this process, which has not died: no sample comes twice
        again = [output.outputs[0].seed for output in llm.generate(prompts, unseeded, use_tqdm=False)]
        assert all(one != other for one, other in zip(seeds, again, strict=True))


def test_a_spent_budget_ends_the_engine_with_the_last_cause() -> None:
    async def scenario() -> None:
        async with AsyncLLM("tiny", max_restarts=1, **SETTINGS) as engine:
            await harm(engine, "worker", signal.SIGKILL)
            params = SamplingParams(max_tokens=None, ignore_eos=True)
            streams = [engine.generate(TEXT, params) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            os.kill((await engine.health()).workers[0].pid, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(WorkerDied, match=r"it was restarted 1 times within 600 s") as caught:
                    async for _ in stream:
                        pass
                assert (caught.value.rank, caught.value.exitcode) == (0, -signal.SIGKILL)
            health = await engine.health()
            assert health.state == "dead"
            with pytest.raises(EngineUnhealthy, match="killed by SIGKILL"):
                await engine.check_health()

    began = {process.pid for process in psutil.Process().children(recursive=True)}
    asyncio.run(scenario())
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in began]
    assert not psutil.wait_procs(left, timeout=10)[1]
