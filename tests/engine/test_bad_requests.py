"""Whatever one request holds, it is refused or answered by itself: nobody beside it notices, and no process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sempre.engine import AsyncLLM, CompletionOutput, ConfigError, RequestOutputKind, SamplingParams

PROMPT = "It is a truth"
BESIDE = SamplingParams(max_tokens=6, seed=5, ignore_eos=True, logprobs=1, output_kind=RequestOutputKind.FINAL_ONLY)

integers = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**70)]))
floats = st.one_of(st.floats(-3, 3), st.sampled_from([float("inf"), float("-inf"), float("nan"), 1e308, 1e-300]))
texts = st.one_of(st.text(max_size=5), st.sampled_from(["\ud800", "\0", "_0", "beside"]))
others = st.one_of(st.none(), st.booleans(), st.binary(max_size=3), st.lists(st.integers(0, 9), max_size=2))
anything = st.one_of(integers, floats, texts, others)
ids = st.lists(integers, max_size=4)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.one_of(st.integers(-1, 3), anything),
    "presence_penalty": floats,
    "frequency_penalty": floats,
    "repetition_penalty": floats,
    "temperature": floats,
    "top_p": floats,
    "top_k": integers,
    "min_p": floats,
    "seed": integers,
    "stop": st.one_of(texts, st.lists(texts, max_size=5)),
    "stop_token_ids": ids,
    "ignore_eos": st.booleans(),
    "min_tokens": integers,
    "logprobs": integers,
    "prompt_logprobs": integers,
    "detokenize": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "output_kind": st.sampled_from(RequestOutputKind),
    "logit_bias": st.dictionaries(integers, floats, max_size=3),
    "allowed_token_ids": ids,
    "bad_words": st.lists(texts, max_size=3),
}
fields = st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.one_of(FIELDS[name], anything) for name in names})
)
token_prompts = st.one_of(ids, st.lists(st.integers(0, 4000), min_size=1, max_size=80))
prompts = st.one_of(
    texts,
    token_prompts,
    anything,
    st.fixed_dictionaries({}, optional={"prompt": texts, "prompt_token_ids": token_prompts, "cache_salt": anything}),
)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as loop_runner:
        yield loop_runner


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner) -> Iterator[AsyncLLM]:
    async_llm = AsyncLLM("tiny", seed=3, max_model_len=64, num_threads=1, max_restarts=0, scheduling_policy="priority")
    runner.run(async_llm.start())
    yield async_llm
    runner.run(async_llm.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def alone(engine: AsyncLLM, runner: asyncio.Runner) -> list[CompletionOutput]:
    return runner.run(run_beside(engine))


async def run_beside(engine: AsyncLLM) -> list[CompletionOutput]:
    return [completion async for output in engine.generate(PROMPT, BESIDE) for completion in output.outputs]


async def run_bad(engine: AsyncLLM, prompt: Any, keywords: dict[str, Any], request_id: Any, priority: Any) -> None:
    # a RequestError is a ConfigError; any other kind would be a hole
    with suppress(ConfigError):
        params = SamplingParams(**({"max_tokens": 5} | keywords))
        async for _ in engine.generate(prompt, params, request_id, priority=priority):
            pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=prompts, keywords=fields, request_id=st.one_of(st.none(), anything), priority=st.one_of(st.just(0), anything)
)
def test_a_bad_request_harms_nobody(
    engine: AsyncLLM,
    runner: asyncio.Runner,
    alone: list[CompletionOutput],
    prompt: Any,
    keywords: dict[str, Any],
    request_id: Any,
    priority: Any,
) -> None:
    async def both() -> list[CompletionOutput]:
        beside, _ = await asyncio.gather(run_beside(engine), run_bad(engine, prompt, keywords, request_id, priority))
        return beside

    assert runner.run(asyncio.wait_for(both(), 60)) == alone
    health = runner.run(engine.health())
    assert health.healthy, health.problems
    assert engine._frontend.processor.num_unfinished == 0
