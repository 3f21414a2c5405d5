"""Axes A12–A15: how a request is made and what it reports do not affect the result.

As in the other axes, each test compares with a request run alone, and must fail under the ordinary matmul.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from surfaces import facts, stream_all
from workload import SETTINGS

from sempre.engine import LLM, SamplingParams
from sempre.engine.outputs import CompletionOutput, RequestOutput

PROMPTS = [
    "It was a dark and stormy night, and the",
    "The",
    "And God said, Let there be",
    "Fellow citizens of the Senate and of the House of Representatives: " * 6,
    "To be, or not to be: that is the question",
    "Call me",
]
PARAMS = SamplingParams(temperature=0.9, top_p=0.97, max_tokens=24, logprobs=3, seed=2024)


def sampled(completion: CompletionOutput) -> tuple[list[int], list[float]]:
    """Token ids and the log-probability of each sampled token."""
    rows = completion.logprobs or []
    return list(completion.token_ids), [row[t].logprob for t, row in zip(completion.token_ids, rows, strict=True)]


@pytest.fixture
def llm(numerics: str) -> Iterator[LLM]:
    with LLM(**SETTINGS, multiprocessing=False, numerics=numerics) as engine:
        yield engine


@cache
def lone(numerics: str, seed: int = PARAMS.seed or 0) -> tuple[CompletionOutput, ...]:
    """Every prompt by itself, one after the other."""
    with LLM(**SETTINGS, multiprocessing=False, numerics=numerics) as engine:
        return tuple(generate(engine, [prompt], replace(PARAMS, seed=seed))[0].outputs[0] for prompt in PROMPTS)


def generate(llm: LLM, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def expect(numerics: str, equal: bool) -> None:
    assert equal is (numerics == "invariant")


def test_surfaces(llm: LLM, numerics: str) -> None:
    """A12: one call for all, a stream for each, and the asynchronous engine in deltas, all at once."""
    alone = [facts(c) for c in lone(numerics)]
    together = [facts(output.outputs[0]) for output in generate(llm, PROMPTS, PARAMS)]
    streamed = asyncio.run(stream_all({**SETTINGS, "numerics": numerics}, PROMPTS, PARAMS))
    expect(numerics, together == alone)
    expect(numerics, streamed == alone)


def test_siblings(llm: LLM, numerics: str) -> None:
    """A13: completion i of n equals a lone request with seed + i."""
    alone = [[facts(c) for c in lone(numerics, 2024 + i)] for i in range(3)]
    outputs = generate(llm, PROMPTS, replace(PARAMS, n=3))
    together = [[facts(output.outputs[i]) for output in outputs] for i in range(3)]
    expect(numerics, together == alone)
    assert [[c.seed for c in output.outputs] for output in outputs] == [[2024, 2025, 2026]] * len(PROMPTS)
    assert alone[0] != alone[1]


def test_a_returned_seed_replays_an_unseeded_sample(llm: LLM, numerics: str) -> None:
    """A request without a seed is told the one it got; with that seed, alone, it gives the same."""
    outputs = generate(llm, PROMPTS, replace(PARAMS, seed=None))
    seeds = [output.outputs[0].seed for output in outputs]
    assert len(set(seeds)) == len(PROMPTS)
    replayed = [
        facts(generate(llm, [prompt], replace(PARAMS, seed=seed))[0].outputs[0])
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    expect(numerics, replayed == [facts(output.outputs[0]) for output in outputs])


REPORTING: list[dict[str, Any]] = [
    {"logprobs": 0},
    {"logprobs": 20},
    {"logprobs": 3, "detokenize": False},
    {"logprobs": 3, "prompt_logprobs": 5},
    {"logprobs": 3, "skip_special_tokens": False},
    {"logprobs": 3, "stop": ["a string that does not come"]},
]


@pytest.mark.parametrize(
    ("numerics", "changes"),
    [("invariant", changes) for changes in REPORTING]
    # the control differs by the batch, whatever is reported: one of them always runs
    + [
        pytest.param("control", changes, marks=[pytest.mark.product] if i else [])
        for i, changes in enumerate(REPORTING)
    ],
    ids=str,
)
def test_reporting(llm: LLM, numerics: str, changes: dict[str, Any]) -> None:
    """A14: reporting changes no token and no log-probability."""
    reported = [sampled(output.outputs[0]) for output in generate(llm, PROMPTS, replace(PARAMS, **changes))]
    expect(numerics, reported == [sampled(c) for c in lone(numerics)])


@pytest.mark.parametrize("numerics", ["invariant"])
def test_no_logprobs_asked_for(llm: LLM) -> None:
    """A14: without log-probabilities the tokens are the same; with another seed they are not."""
    alone = [c.token_ids for c in lone("invariant")]
    silent = replace(PARAMS, logprobs=None)
    assert [output.outputs[0].token_ids for output in generate(llm, PROMPTS, silent)] == alone
    assert [output.outputs[0].token_ids for output in generate(llm, PROMPTS, replace(silent, seed=1))] != alone


def test_stop_string_cuts_and_changes_nothing_before(llm: LLM, numerics: str) -> None:
    """A14: a request ended by a stop string is a prefix of the one without it."""
    whole = lone(numerics)
    stopped = generate(llm, PROMPTS, replace(PARAMS, stop=["e"]))
    beginnings = []
    for output, full in zip(stopped, whole, strict=True):
        tokens, logprobs = sampled(output.outputs[0])
        all_tokens, all_logprobs = sampled(full)
        beginnings.append(tokens == all_tokens[: len(tokens)] and logprobs == all_logprobs[: len(tokens)])
    assert any(len(o.outputs[0].token_ids) < 24 for o in stopped)
    expect(numerics, all(beginnings))


def test_scoring(llm: LLM, numerics: str) -> None:
    """A15: scoring prompt + output gives the log-probabilities that were given while generating."""
    outputs = generate(llm, PROMPTS, replace(PARAMS, temperature=1.3))
    texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
    scores = llm.score([{"prompt_token_ids": text} for text in texts])
    scored = [score.logprobs[len(output.prompt_token_ids) :] for score, output in zip(scores, outputs, strict=True)]
    expect(numerics, scored == [sampled(output.outputs[0])[1] for output in outputs])


def test_continuing_from_ones_own_output(llm: LLM, numerics: str) -> None:
    """Position is absolute: prompt + the first m output tokens with the same seed continue the original."""
    whole = [facts(output.outputs[0]) for output in generate(llm, PROMPTS, PARAMS)]
    resumed = []
    for prompt, (tokens, rows) in zip(PROMPTS, whole, strict=True):
        prefix = llm.get_tokenizer().encode(prompt) + tokens[:7]
        params = replace(PARAMS, max_tokens=24 - 7)
        rest_tokens, rest_rows = facts(llm.generate([prefix], params, use_tqdm=False)[0].outputs[0])
        resumed.append((tokens[:7] + rest_tokens, rows[:7] + rest_rows))
    expect(numerics, resumed == whole)
