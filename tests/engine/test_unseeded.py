"""Axis A19: the seed of a request without one depends on equal requests before it, and on no others."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest

from sempre.engine import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from sempre.engine.frontend.limits import RequestLimits
from sempre.engine.frontend.request_builder import RequestBuilder
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.engine.text.tokenizer import Tokenizer

LIMITS = RequestLimits(
    engine_seed=11, vocab_size=360, max_model_len=64, max_kv_tokens=1024, max_logprobs=20, eos_token_ids=[1]
)
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "num_threads": 1, "multiprocessing": False}
PROMPTS = ["It is a truth", "The whale", "She was", "Call me", "And God said"]
PARAMS = SamplingParams(temperature=0.9, max_tokens=6, ignore_eos=True)

# every parameter: another value, and whether that makes it another request to sample from
CHANGES: dict[str, tuple[Any, bool]] = {
    "n": (2, False),
    "presence_penalty": (0.5, True),
    "frequency_penalty": (0.5, True),
    "repetition_penalty": (1.5, True),
    "temperature": (0.5, True),
    "top_p": (0.9, True),
    "top_k": (7, True),
    "min_p": (0.1, True),
    "seed": (5, False),
    "stop": ("x", False),
    "stop_token_ids": ([7], False),
    "ignore_eos": (True, False),
    "max_tokens": (3, False),
    "min_tokens": (2, False),
    "logprobs": (1, False),
    "prompt_logprobs": (1, False),
    "prompt_logprob_token_ids": ([[4]], False),
    "prompt_logprob_start": (0, False),
    "logprob_token_ids": ([4], False),
    "flat_logprobs": (True, False),
    "detokenize": (False, False),
    "skip_special_tokens": (False, False),
    "include_stop_str_in_output": (True, False),
    "output_kind": (RequestOutputKind.DELTA, False),
    "stream_interval": (3, False),
    "structured_outputs": (StructuredOutputsParams(regex="[a-z]+"), True),
    "logit_bias": ({5: 1.0}, True),
    "allowed_token_ids": ([5, 6], True),
    "bad_words": (["fox"], True),
    "thinking_token_budget": (5, False),
    "truncate_prompt_tokens": (50, False),
    "truncation_side": ("right", False),
}


@pytest.fixture
def builder(byte_level: Tokenizer) -> RequestBuilder:
    return RequestBuilder(byte_level, LIMITS)


def seeds(builder: RequestBuilder, prompts: list[str], params: SamplingParams = PARAMS) -> list[int]:
    return [request.seeds[0] for request in builder.build_all(prompts, params)]


def test_every_parameter_has_decided() -> None:
    assert list(CHANGES) == [field.name for field in dataclasses.fields(SamplingParams)]


@pytest.mark.parametrize("name", CHANGES)
def test_which_requests_are_equal(byte_level: Tokenizer, name: str) -> None:
    value, is_another = CHANGES[name]
    changed = SamplingParams(**{name: value})
    [first, second] = seeds(RequestBuilder(byte_level, LIMITS), ["fox", "fox"], SamplingParams())
    alone = RequestBuilder(byte_level, LIMITS)
    assert alone.build("fox", dataclasses.replace(changed, seed=None)).seeds[0] != first or not is_another
    after = RequestBuilder(byte_level, LIMITS)
    after.build("fox", changed)
    # a request with a seed of its own is not counted
    expected = first if is_another or name == "seed" else second
    assert seeds(after, ["fox"], SamplingParams()) == [expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0, "top_p": 0.5},
        {"temperature": 0, "top_k": 3, "min_p": 0.5},
        {"temperature": 0, "presence_penalty": -0.0},
    ],
    ids=str,
)
def test_equal_words_for_greedy(builder: RequestBuilder, byte_level: Tokenizer, changes: dict[str, Any]) -> None:
    greedy = SamplingParams(temperature=0)
    first, second, third = (
        seeds(builder, ["fox"], params)[0] for params in (greedy, SamplingParams(**changes), greedy)
    )
    assert len({first, second, third}) == 3
    again = RequestBuilder(builder._tokenizer, LIMITS)
    assert seeds(again, ["fox"] * 3, greedy) == [first, second, third]


def test_order_and_number_of_other_requests_do_not_matter(byte_level: Tokenizer) -> None:
    alone = {prompt: seeds(RequestBuilder(byte_level, LIMITS), [prompt])[0] for prompt in PROMPTS[:4]}
    assert len(set(alone.values())) == 4
    for order in permutations(PROMPTS[:4]):
        builder = RequestBuilder(byte_level, LIMITS)
        assert dict(zip(order, seeds(builder, list(order)), strict=True)) == alone


def test_the_same_again_is_a_new_sample(builder: RequestBuilder, byte_level: Tokenizer) -> None:
    three = seeds(builder, ["fox"] * 3)
    assert len(set(three)) == 3
    # a new engine begins at 0; one with another seed has others
    assert seeds(RequestBuilder(byte_level, LIMITS), ["fox"] * 3) == three
    other = RequestBuilder(byte_level, dataclasses.replace(LIMITS, engine_seed=12))
    assert not set(seeds(other, ["fox"] * 3)) & set(three)


def test_siblings_use_the_seeds_that_follow(builder: RequestBuilder) -> None:
    request = builder.build("fox", SamplingParams(n=3))
    first = request.seeds[0]
    assert request.seeds == [first, (first + 1) % 2**64, (first + 2) % 2**64]
    assert builder.build("fox", SamplingParams(seed=request.seeds[2])).sequences[0].seed == request.sequences[2].seed


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", seed=3, **SETTINGS) as engine:
        yield engine


def facts(outputs: Any) -> dict[str, tuple[int, list[int]]]:
    return {output.prompt: (output.outputs[0].seed, output.outputs[0].token_ids) for output in outputs}


def test_surfaces_and_concurrency(llm: LLM) -> None:
    """One call each, one call for all in another order, and the asynchronous engine all at once: equal tokens."""
    one_by_one = facts(llm.generate([prompt], PARAMS, use_tqdm=False)[0] for prompt in PROMPTS)

    async def all_at_once() -> dict[str, tuple[int, list[int]]]:
        async def one(engine: AsyncLLM, prompt: str) -> Any:
            async for output in engine.generate(prompt, PARAMS):
                last = output
            return last

        async with AsyncLLM("tiny", seed=3, **SETTINGS) as engine:
            return facts(await asyncio.gather(*(one(engine, prompt) for prompt in reversed(PROMPTS))))

    assert asyncio.run(all_at_once()) == one_by_one
    with LLM("tiny", seed=3, **SETTINGS) as engine:
        together = engine.generate(["something else", *reversed(PROMPTS)], PARAMS, use_tqdm=False)
    assert facts(together[1:]) == one_by_one
    again = facts(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    assert all(again[prompt] != one_by_one[prompt] for prompt in PROMPTS)


def test_the_number_of_forgotten_requests_is_a_metric(llm: LLM) -> None:
    assert [metric.value for metric in llm.get_metrics() if metric.name == "sempre:unseeded_digests_dropped"] == [0]
