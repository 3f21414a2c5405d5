"""The asynchronous interface on the embedded model, in real processes, one engine for all tests."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import psutil
import pytest

from sempre.engine import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    ConfigError,
    EngineDeadError,
    Gauge,
    Logprob,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    WorkerDied,
)
from sempre.engine.output_stream import MOST_AHEAD

PROMPT = "It is a truth"
# a context long enough that a request without a limit runs for seconds: one that is ended has not ended by itself
SETTINGS: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 8, "num_threads": 1}
DELTA = RequestOutputKind.DELTA
Joined = tuple[list[int], list[dict[int, Logprob]]]
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as loop_runner:
        yield loop_runner


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner) -> Iterator[AsyncLLM]:
    async_llm = AsyncLLM("tiny", seed=3, **SETTINGS)
    runner.run(async_llm.start())
    yield async_llm
    runner.run(async_llm.__aexit__(None, None, None))


@pytest.fixture
def run(runner: asyncio.Runner) -> Run:
    return lambda coroutine: runner.run(asyncio.wait_for(coroutine, 120))


def short(**keywords: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "seed": 5, "ignore_eos": True, **keywords})


async def collect(stream: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in stream]


async def num_ended(engine: AsyncLLM, reason: str) -> int:
    metrics = await engine.get_metrics()
    (count,) = (metric.value for metric in metrics if metric.labels.get("finished_reason") == reason)  # type: ignore[attr-defined]
    return int(count)


async def num_aborted(engine: AsyncLLM) -> int:
    """Requests that the coordinator was told to end; one that was forgotten here only would run to its length."""
    return await num_ended(engine, "abort")


async def wait_for_idle(engine: AsyncLLM) -> bool:
    for _ in range(500):
        metrics = await engine.get_metrics()
        running = [metric.value for metric in metrics if isinstance(metric, Gauge) and "num_requests" in metric.name]
        if not any(running):
            return True
        await asyncio.sleep(0.01)
    return False


def test_equal_to_the_synchronous_interface(engine: AsyncLLM, run: Run) -> None:
    async def both() -> list[list[RequestOutput]]:
        streams = [engine.generate(PROMPT, short(logprobs=2)), engine.generate("The whale", short(n=2))]
        return await asyncio.gather(*map(collect, streams))

    first, second = run(both())
    with LLM("tiny", seed=3, multiprocessing=False, **SETTINGS) as llm:
        expected = llm.generate([PROMPT, "The whale"], [short(logprobs=2), short(n=2)], use_tqdm=False)
        assert engine.fingerprint == llm.fingerprint
    assert first[-1].outputs == expected[0].outputs
    last = {completion.index: completion for output in second for completion in output.outputs}
    assert [last[0], last[1]] == expected[1].outputs
    assert second[-1].finished


def test_delta_outputs_join_to_the_cumulative_one(engine: AsyncLLM, run: Run) -> None:
    whole = run(collect(engine.generate(PROMPT, short())))[-1].outputs[0]
    deltas = run(collect(engine.generate(PROMPT, short(output_kind=DELTA))))
    assert "".join(output.outputs[0].text for output in deltas) == whole.text
    assert [token_id for output in deltas for token_id in output.outputs[0].token_ids] == whole.token_ids
    (final,) = run(collect(engine.generate(PROMPT, short(output_kind=RequestOutputKind.FINAL_ONLY))))
    assert final.outputs[0] == whole


def test_a_loop_that_was_held_up_misses_nothing(engine: AsyncLLM, run: Run) -> None:
    async def held_up() -> list[RequestOutput]:
        stream = engine.stream(PROMPT, short(max_tokens=60, output_kind=DELTA))
        outputs: list[RequestOutput] = []
        while news := await stream.next():
            outputs += news
            time.sleep(0.02)  # the engine goes on meanwhile
        stream.close()
        return outputs

    [whole] = run(collect(engine.generate(PROMPT, short(max_tokens=60, output_kind=RequestOutputKind.FINAL_ONLY))))
    parts = run(held_up())
    assert [token for part in parts for token in part.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert "".join(part.outputs[0].text for part in parts) == whole.outputs[0].text


async def held_until_read(engine: AsyncLLM, params: SamplingParams) -> tuple[int, dict[int, Joined]]:
    """Read once, then not before the engine waits, then all; how much was held, and the outputs joined."""
    stream = engine.stream(PROMPT, params)
    outputs = await stream.next()
    held, before = 0, -1
    while not stream._paused or held != before:
        await asyncio.sleep(0.3)
        held, before = stream._num_held, held
    joined: dict[int, Joined] = {index: ([], []) for index in range(params.n)}
    while outputs:
        for choice in (choice for output in outputs for choice in output.outputs):
            joined[choice.index][0].extend(choice.token_ids)
            joined[choice.index][1].extend(choice.logprobs or [])
        outputs = await stream.next()
    stream.close()
    return held, joined


def check_slow_reader(engine: AsyncLLM, run: Run) -> None:
    params = short(n=8, max_tokens=260, logprobs=20, temperature=1.0, output_kind=RequestOutputKind.FINAL_ONLY)
    (whole,) = run(collect(engine.generate(PROMPT, params)))
    num_all = sum(len(row) + 1 for choice in whole.outputs for row in choice.logprobs or [])
    held, joined = run(held_until_read(engine, replace(params, output_kind=DELTA)))
    # what one step adds may exceed the limit, and steps are in flight
    assert MOST_AHEAD < held < MOST_AHEAD + 8 * 8 * 22 < num_all
    assert joined == {choice.index: (choice.token_ids, choice.logprobs) for choice in whole.outputs}
    (other,) = run(collect(engine.generate(PROMPT, replace(params, seed=999, n=1, max_tokens=12))))
    assert other.outputs[0].token_ids != joined[0][0][:12], "the control"


def test_the_engine_waits_for_a_slow_reader(engine: AsyncLLM, run: Run) -> None:
    check_slow_reader(engine, run)


def test_an_engine_in_this_process_waits_for_a_slow_reader(runner: asyncio.Runner, run: Run) -> None:
    async_llm = AsyncLLM("tiny", seed=3, multiprocessing=False, **SETTINGS)
    runner.run(async_llm.start())
    try:
        check_slow_reader(async_llm, run)
    finally:
        runner.run(async_llm.__aexit__(None, None, None))


def test_an_answer_is_bounded_by_its_log_probabilities(engine: AsyncLLM, run: Run) -> None:
    async def read(limit: int, params: SamplingParams) -> list[RequestOutput]:
        stream = engine.stream(PROMPT, params, max_held_logprobs=limit)
        try:
            return await stream.next()
        finally:
            stream.close()

    whole = short(output_kind=RequestOutputKind.FINAL_ONLY)
    for params in (replace(whole, logprobs=2), replace(whole, prompt_logprobs=2), replace(whole, logprobs=2, n=2)):
        (expected,) = run(collect(engine.generate(PROMPT, params)))
        (found,) = run(read(1000, params))
        assert [list(choice.logprobs or []) for choice in found.outputs] == [
            choice.logprobs or [] for choice in expected.outputs
        ]
        assert list(found.prompt_logprobs or []) == (expected.prompt_logprobs or [])
        with pytest.raises(RequestError, match=r"at most 8 may be held until it is complete \(--max-held-logprobs\)"):
            run(read(8, params))
    assert run(read(8, whole)), "tokens alone are not counted"
    assert engine._frontend.processor.num_unfinished == 0
    assert run(wait_for_idle(engine))


def test_stop_string(engine: AsyncLLM, run: Run) -> None:
    text = run(collect(engine.generate(PROMPT, short())))[-1].outputs[0].text
    stop = text[len(text) // 2 :][:4]
    before = run(num_ended(engine, "stop"))
    completion = run(collect(engine.generate(PROMPT, short(max_tokens=None, stop=stop))))[-1].outputs[0]
    assert (completion.text, completion.stop_reason) == (text[: text.index(stop)], stop)
    assert run(wait_for_idle(engine))
    assert run(num_ended(engine, "stop")) == before + 1


def test_abort(engine: AsyncLLM, run: Run) -> None:
    async def abort_after_two() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate(PROMPT, short(max_tokens=None), "mine"):
            outputs.append(output)
            if len(outputs) == 2:
                await engine.abort("mine")
        await engine.abort("mine")
        return outputs

    before = run(num_aborted(engine))
    outputs = run(abort_after_two())
    assert (outputs[-1].finished, outputs[-1].outputs[0].finish_reason) == (True, "abort")
    assert outputs[-1].request_id == "mine"
    assert run(wait_for_idle(engine))
    assert run(num_aborted(engine)) == before + 1


def test_closing_the_generator_aborts(engine: AsyncLLM, run: Run) -> None:
    async def leave_early() -> None:
        async with aclosing(engine.generate(PROMPT, short(max_tokens=None))) as stream:
            async for _ in stream:
                break

    before = run(num_aborted(engine))
    run(leave_early())
    assert run(wait_for_idle(engine))
    assert run(num_aborted(engine)) == before + 1


def test_cancelling_the_task_aborts(engine: AsyncLLM, run: Run) -> None:
    async def cancel() -> None:
        has_begun = asyncio.Event()

        async def read() -> None:
            async for _ in engine.generate(PROMPT, short(max_tokens=None)):
                has_begun.set()

        task = asyncio.create_task(read())
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = run(num_aborted(engine))
    run(cancel())
    assert run(wait_for_idle(engine))
    assert run(num_aborted(engine)) == before + 1


def test_errors_are_raised(engine: AsyncLLM, run: Run) -> None:
    with pytest.raises(RequestError, match="Token id 99999 is out of vocabulary"):
        run(collect(engine.generate([99999], short())))

    async def twice() -> None:
        async with aclosing(engine.generate(PROMPT, short(max_tokens=None), "same")) as stream:
            await anext(stream)
            await collect(engine.generate(PROMPT, short(), "same"))

    with pytest.raises(RequestError, match="request_id 'same' is in use by an unfinished request"):
        run(twice())


def test_calls(engine: AsyncLLM, run: Run) -> None:
    (result,) = run(engine.collective_rpc("rng_digests"))
    assert set(result) >= {"python_random", "numpy_random", "torch_cpu"}
    with pytest.raises(TimeoutError, match=r"no answer to CallWorkers within 0 s"):
        run(engine.collective_rpc("rng_digests", timeout=0))
    assert run(wait_for_idle(engine))
    assert run(engine.reset_prefix_cache()) is True
    assert engine.get_default_sampling_params() == SamplingParams()
    assert engine.get_tokenizer().decode(engine.get_tokenizer().encode(PROMPT)) == PROMPT


def test_nothing_is_kept(engine: AsyncLLM, run: Run) -> None:
    run(collect(engine.generate(PROMPT, short(n=2))))
    assert engine._frontend.processor.num_unfinished == 0
    assert engine._streams == {}
    assert engine._replies == {}


def test_use_before_the_start_and_after_the_end(run: Run) -> None:
    async def lifecycle() -> None:
        async_llm = AsyncLLM("tiny", **SETTINGS)
        with pytest.raises(EngineDeadError, match="this AsyncLLM is not started"):
            async_llm.stream(PROMPT)
        async with async_llm:
            with pytest.raises(EngineDeadError, match="this AsyncLLM was started before"):
                await async_llm.start()
            stream = async_llm.generate(PROMPT, short(max_tokens=None))
            await anext(stream)
        for use in (collect(stream), collect(async_llm.generate(PROMPT)), async_llm.get_metrics()):
            with pytest.raises(EngineDeadError, match="this AsyncLLM was shut down"):
                await use

    before = len(psutil.Process().children(recursive=True))
    run(lifecycle())
    assert len(psutil.Process().children(recursive=True)) == before


def test_the_first_calls_start_the_engine_once(run: Run) -> None:
    """Whatever they are, and though one of them is given up meanwhile; a start that fails is tried again."""

    async def begin() -> list[int]:
        args = AsyncEngineArgs("tiny", **SETTINGS)
        async_llm = AsyncLLM.from_engine_args(args)
        assert (await async_llm.health()).state == "starting"
        impatient = asyncio.create_task(anext(async_llm.generate(PROMPT, short())))
        calls = [collect(async_llm.generate(PROMPT, short(seed=1))), async_llm.get_metrics()]
        running = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.2)
        impatient.cancel()
        with pytest.raises(EngineDeadError, match="started before"):
            await async_llm.start()
        [*_, output], metrics = await asyncio.gather(*running)
        assert len([metric for metric in metrics if metric.name == "sempre:kv_cache_usage_perc"]) == 1
        async_llm.shutdown()
        with pytest.raises(EngineDeadError, match="this AsyncLLM was shut down"):
            await collect(async_llm.generate(PROMPT))
        token_ids: list[int] = output.outputs[0].token_ids
        return token_ids

    async def end_meanwhile() -> None:
        async_llm = AsyncLLM("tiny", **SETTINGS)
        asked = asyncio.create_task(async_llm.get_metrics())
        await asyncio.sleep(0.2)
        async_llm.shutdown()
        with pytest.raises(EngineDeadError, match="this AsyncLLM was shut down"):
            await asked

    async def fail_twice() -> None:
        async_llm = AsyncLLM("tiny", **{**SETTINGS, "kv_cache_memory_bytes": 1})
        for _ in range(2):
            with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
                await collect(async_llm.generate(PROMPT))

    before = len(psutil.Process().children(recursive=True))
    token_ids = run(begin())
    run(fail_twice())
    run(end_meanwhile())
    assert len(psutil.Process().children(recursive=True)) == before
    with LLM("tiny", **SETTINGS) as llm:
        assert llm.generate(PROMPT, short(seed=1), use_tqdm=False)[0].outputs[0].token_ids == token_ids


def test_a_death_without_restarts_reaches_every_generator(run: Run) -> None:
    async def die() -> None:
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        async with AsyncLLM("tiny", max_restarts=0, **SETTINGS) as async_llm:
            streams = [async_llm.generate(PROMPT, short(max_tokens=None)) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            new = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
            (worker,) = [process for process in new if "sempre.workers" in process.cmdline()]
            worker.kill()
            for stream in streams:
                with pytest.raises(WorkerDied) as caught:
                    await collect(stream)
                assert (caught.value.rank, caught.value.exitcode) == (0, -9)
            depths = set()
            for call in (async_llm.get_metrics, lambda: collect(async_llm.generate(PROMPT, short()))) * 8:
                with pytest.raises(WorkerDied) as caught:
                    await call()
                text = "".join(traceback.format_exception(caught.value))
                depths.add((call == async_llm.get_metrics, len(text)))
            # an error of its own for each: none tells of the raises before it
            assert len(depths) == 2

    run(die())


def test_an_engine_that_has_ended_can_be_started_again(run: Run) -> None:
    """Its outputs are the same; until then health tells that it has ended."""

    async def again() -> None:
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        async with AsyncLLM("tiny", max_restarts=0, **SETTINGS) as async_llm:
            with pytest.raises(EngineDeadError, match="only an engine that has ended"):
                await async_llm.restart()
            params = short(seed=5, temperature=1.0, logprobs=2)
            [*_, expected] = await collect(async_llm.generate(PROMPT, params))
            new = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
            next(process for process in new if "sempre.workers" in process.cmdline()).kill()
            assert isinstance(await async_llm.wait_for_end(), WorkerDied)
            assert (await async_llm.health()).state == "dead"
            await async_llm.restart()
            assert (await async_llm.health()).healthy
            [*_, found] = await collect(async_llm.generate(PROMPT, params))
            assert found.outputs == expected.outputs
            assert not psutil.wait_procs(new, timeout=5)[1]

    run(again())
