"""An engine that sleeps gives back memory and computes nothing; awake again, it gives the bits that it would have."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from sempre.engine import LLM, AsyncLLM, ConfigError, ModelError, RequestError, RequestOutput, SamplingParams
from sempre.engine.sleep_calls import MODES

SETTINGS: dict[str, Any] = {"max_model_len": 256, "num_threads": 1, "heartbeat_interval_s": 0.1}
PROMPTS = ["It is a truth universally acknowledged, that a man " * 2, "The whale", "And God said"]
PARAMS = SamplingParams(max_tokens=24, logprobs=2, prompt_logprobs=0, seed=5, ignore_eos=True)
FOLDER = Path(__file__).parents[2] / "engine" / "checkpoints" / "tiny"
MISTAKES: list[tuple[Callable[[LLM], object], str]] = [
    (lambda llm: llm.sleep(3), "level must be 0"),
    (lambda llm: llm.sleep(True), "level must be 0"),
    (lambda llm: llm.sleep(mode="later"), "mode must be one of"),  # type: ignore[arg-type]
    (lambda llm: llm.wake_up("weights"), "tags must be a list"),  # type: ignore[arg-type]
    (lambda llm: llm.wake_up([]), "tags must be a list"),
    (lambda llm: llm.wake_up(["graphs"]), "tags must be of"),  # type: ignore[list-item]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model, whose files a test may change."""
    return shutil.copytree(FOLDER, tmp_path_factory.mktemp("sleep") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SETTINGS, multiprocessing=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[Any]:
    return run(llm)


@pytest.fixture(scope="module")
def loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


def bits(outputs: list[RequestOutput]) -> list[Any]:
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs) for output in outputs]


def run(engine: LLM) -> list[Any]:
    return bits(engine.generate(PROMPTS, PARAMS, use_tqdm=False))


def memory(engine: LLM) -> dict[str, int]:
    [found, *_] = engine.collective_rpc("memory")
    assert isinstance(found, dict)
    return found


def test_bits_are_the_same_after_each_level(llm: LLM, expected: list[Any]) -> None:
    fingerprint, awake = llm.fingerprint, memory(llm)
    for level in range(3):
        llm.sleep(level)
        assert llm.is_sleeping()
        kept = memory(llm)
        assert (kept["kv_cache_bytes"] > 0, kept["weight_bytes"] > 0) == (level < 1, level < 2)
        with pytest.raises(RequestError, match=r"the engine sleeps \(scheduling.*; call wake_up\(\) first"):
            run(llm)
        llm.wake_up()
        assert (llm.is_sleeping(), llm.fingerprint) == (False, fingerprint)
        assert memory(llm)["kv_cache_bytes"] == awake["kv_cache_bytes"]
        assert run(llm) == expected
    other = llm.generate(PROMPTS, SamplingParams(max_tokens=24, logprobs=2, seed=6), use_tqdm=False)
    assert bits(other) != expected, "the comparison notices another seed"


def test_what_becomes_of_unfinished_requests(llm: LLM, expected: list[Any]) -> None:
    for mode in MODES:
        llm.enqueue(PROMPTS, PARAMS)
        llm.sleep(2, mode=mode)
        if mode == "keep":
            with pytest.raises(RequestError, match=r"found them asleep: wake up 'weights'"):
                llm.load_weights(FOLDER)
        llm.wake_up()
        outputs = llm.wait_for_completion(use_tqdm=False)
        if mode == "abort":
            assert [output.outputs[0].finish_reason for output in outputs] == ["abort"] * 3
        else:
            assert bits(outputs) == expected
    assert run(llm) == expected


def test_mistakes_are_refused_by_name(llm: LLM, expected: list[Any]) -> None:
    for call, text in MISTAKES:
        with pytest.raises(ConfigError, match=text):
            call(llm)
    llm.sleep(2)
    with pytest.raises(RequestError, match="sleeps without its weights"):
        llm.collective_rpc("parameter_digest")
    with pytest.raises(RequestError, match="'weights' with or before 'kv_cache'"):
        llm.wake_up(["kv_cache"])
    llm.wake_up(["weights"])
    with pytest.raises(RequestError, match="sleeps without its caches"):
        llm.collective_rpc("kv_cache_digest", args=[[0]])
    llm.wake_up(["kv_cache"])
    assert (llm.is_sleeping(), run(llm)) == (False, expected)


def test_weights_that_changed_meanwhile_are_noticed(llm: LLM, model: Path, expected: list[Any]) -> None:
    file = model / "model.safetensors"
    own = file.read_bytes()
    llm.sleep(2)
    file.write_bytes(own[:-1] + bytes([own[-1] ^ 1]))
    with pytest.raises(ModelError, match="the files have changed while the engine slept"):
        llm.wake_up()
    assert llm.is_sleeping()
    file.write_bytes(own)
    llm.wake_up()
    assert run(llm) == expected


@pytest.mark.product
def test_new_weights_between_two_tags(llm: LLM, tmp_path: Path, expected: list[Any]) -> None:
    changed = shutil.copytree(FOLDER, tmp_path / "changed")
    tensors = load_file(FOLDER / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * torch.tensor(1.25, dtype=torch.bfloat16)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with LLM(changed, **SETTINGS, multiprocessing=False) as engine:
        fresh = (engine.fingerprint, run(engine))
    llm.sleep(2)
    llm.wake_up(["weights"])
    llm.load_weights(changed)
    llm.wake_up(["kv_cache"])
    assert (llm.fingerprint, run(llm)) == fresh
    assert fresh[1] != expected
    # they are also those of a second waking
    llm.sleep(2)
    llm.wake_up()
    assert run(llm) == fresh[1]
    llm.load_weights(FOLDER)
    assert run(llm) == expected


@pytest.mark.product
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"speculative_config": {"model": "tiny-draft", "num_speculative_tokens": 3}},
        {"speculative_config": {"model": "tiny-draft", "num_speculative_tokens": 3, "placement": "worker"}},
        {"dtype": "bfloat16", "quantization": "int8"},
    ],
    ids=str,
)
def test_layouts(layout: dict[str, Any]) -> None:
    with LLM("tiny", **SETTINGS, **layout) as engine:
        before, pids = run(engine), engine.llm_engine.parallel_config.worker_pids
        resident = sum(psutil.Process(pid).memory_info().rss for pid in pids)
        for level in (1, 2):
            engine.enqueue(PROMPTS, PARAMS)
            engine.sleep(level, mode="keep")
            asleep = sum(psutil.Process(pid).memory_info().rss for pid in pids)
            assert asleep < resident
            engine.wake_up()
            assert bits(engine.wait_for_completion(use_tqdm=False)) == before
            assert run(engine) == before


@pytest.mark.product
@pytest.mark.parametrize("victim", ["worker", "coordinator"])
def test_a_process_that_dies_asleep(victim: str, expected: list[Any]) -> None:
    with LLM("tiny", **SETTINGS) as engine:
        engine.enqueue(PROMPTS, PARAMS)
        engine.sleep(2, mode="keep")
        pid = psutil.Process(engine.llm_engine.parallel_config.worker_pids[0])
        os.kill(pid.pid if victim == "worker" else pid.ppid(), signal.SIGKILL)
        # answered by the successors, which sleep as well
        assert engine.is_sleeping()
        assert memory(engine)["weight_bytes"] == 0
        engine.wake_up()
        assert bits(engine.wait_for_completion(use_tqdm=False)) == expected


@pytest.mark.product
def test_requests_that_come_meanwhile_wait(loop: Any, expected: list[Any]) -> None:
    async def together() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as engine:
            first = engine.stream(PROMPTS, PARAMS)
            await engine.pause_generation(mode="keep")
            second = engine.stream(PROMPTS, PARAMS)
            waiting = asyncio.gather(first.finished(), second.finished())
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            assert (done, await engine.is_paused(), await engine.is_sleeping()) == (set(), True, True)
            assert (await engine.health()).healthy
            await engine.sleep(1, mode="keep")
            with pytest.raises(RequestError, match="'kv_cache' with or before 'scheduling'"):
                await engine.resume_generation()
            await engine.wake_up()
            assert [bits(outputs) for outputs in await waiting] == [expected, expected]
            third = engine.stream(PROMPTS, PARAMS)
            finished = asyncio.create_task(third.finished())
            await engine.sleep(2, mode="wait")
            assert bits(await finished) == expected
            fourth = engine.stream(PROMPTS, PARAMS)
            fourth.close()
            await engine.wake_up()
            aborted = engine.stream(PROMPTS, PARAMS)
            await engine.pause_generation()
            assert {output.outputs[0].finish_reason for output in await aborted.finished()} == {"abort"}
            await engine.resume_generation()
            assert bits(await engine.stream(PROMPTS, PARAMS).finished()) == expected

    loop(together())
