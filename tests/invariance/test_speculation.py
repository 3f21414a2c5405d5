"""Axis A9: whatever is drafted, the tokens and all log-probability bits are the same as without speculation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from drafters import drafting_with
from workload import KV_BLOCK_BYTES

from sempre.engine import LLM, Counter, Gauge, SamplingParams
from sempre.engine.outputs import CompletionOutput
from sempre.engine.speculation.costs import DraftCosts
from sempre.workers import runner

# the first and the last repeat themselves, so that lookup finds something
PROMPTS = [
    "one two three four, one two three four, one two three four, one two",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "To the Senate and House of Representatives: to the Senate and",
    "A",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return a + b\n\ndef add(a,",
    "The captain of the ship",
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"logprobs": 0},
    "truncated": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    "penalties": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "logit_bias": {17: 2.0, 300: -1.5},
        "bad_words": [" the", " of the"],
        "min_tokens": 9,
        "logprobs": 2,
    },
    "n": {"n": 3, "logprobs": 1},
    "stop": {"stop": ["e ", "and"], "logprobs": 1},
    "logprobs": {"logprobs": 20, "prompt_logprobs": 1},
}
ALL_KINDS = tuple(KINDS)
TEMPERATURES = (0.0, 0.7, 1.0, 1.5)
DRAFTERS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram"},
    "suffix": {"method": "suffix"},
    "colocated": {"method": "draft_model", "model": "tiny-draft"},
    "worker": {"method": "draft_model", "model": "tiny-draft", "placement": "worker"},
    "random": {"method": "ngram"},
    "half": {"method": "ngram"},
    "oracle": {"method": "ngram"},
}
SHARES_RIGHT = {"random": 0.0, "half": 0.5, "oracle": 1.0}
ROOMS: dict[str, dict[str, Any]] = {
    "roomy": {},
    # prompts are cut, and a request that grows takes the blocks of another
    "crowded": {"max_num_batched_tokens": 20, "kv_cache_memory_bytes": 6 * KV_BLOCK_BYTES},
}
DRAFT_BLOCK_BYTES = 2 * 2 * 1 * 64 * 16 * 2  # k and v, 2 layers, 1 head, 64 dimensions, 16 tokens, bfloat16
SIZES = (1, 2, 4, 7)
SETTINGS: dict[str, Any] = {"multiprocessing": False, "num_threads": 1, "max_model_len": 96}
# together every drafter, size, cache size, and most pairs
COVERING = [
    ("ngram", 4, "roomy"),
    ("ngram", 2, "crowded"),
    ("suffix", 7, "crowded"),
    ("colocated", 4, "roomy"),
    ("colocated", 1, "crowded"),
    ("worker", 2, "roomy"),
    ("random", 7, "roomy"),
    ("half", 4, "crowded"),
    ("oracle", 1, "roomy"),
]
PRODUCT = [(drafter, size, room) for drafter in DRAFTERS for size in SIZES for room in ROOMS]

Facts = list[tuple[Any, ...]]


def workload(kinds: tuple[str, ...] = ALL_KINDS) -> tuple[list[str], list[SamplingParams]]:
    """These kinds of sampling at every temperature: more than 32 sequences in all, each with its own prompt."""
    prompts, params = [], []
    for index, (kind, temperature) in enumerate((k, t) for k in kinds for t in TEMPERATURES):
        changes = KINDS[kind]
        if temperature == 0.0 and "n" in changes:
            changes = {"logprobs": 1}
        prompts.append(f"{index} {PROMPTS[index % len(PROMPTS)]}")
        params.append(SamplingParams(temperature=temperature, seed=50 + index, max_tokens=24, **changes))
    return prompts, params


def facts(completion: CompletionOutput) -> tuple[Any, ...]:
    assert completion.error is None
    assert completion.logprobs is not None
    rows = [[(t, r.logprob.hex(), r.rank) for t, r in row.items()] for row in completion.logprobs]
    return completion.token_ids, rows, completion.text, completion.finish_reason, completion.stop_reason


def run(llm: LLM, kinds: tuple[str, ...] = ALL_KINDS, *, alone: bool = False) -> Facts:
    prompts, params = workload(kinds)
    if alone:
        outputs = [llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [facts(completion) for output in outputs for completion in output.outputs]


def counted(llm: LLM) -> dict[str, float]:
    """Metrics of the one replica by name; accepted tokens per position under their position."""
    return {
        metric.name.removeprefix("sempre:") + metric.labels.get("position", ""): metric.value
        for metric in llm.get_metrics()
        if isinstance(metric, Counter | Gauge)
    }


@cache
def plain(numerics: str = "invariant", kinds: tuple[str, ...] = ALL_KINDS) -> tuple[Facts, list[list[int]]]:
    """Without speculation, each request alone; and the whole sequences, prompts first."""
    with LLM("tiny", **SETTINGS, numerics=numerics) as llm:
        results = run(llm, kinds, alone=True)
        prompts, params = workload(kinds)
        encoded = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    repeated = [tokens for tokens, param in zip(encoded, params, strict=True) for _ in range(param.n)]
    return results, [prompt + result[0] for prompt, result in zip(repeated, results, strict=True)]


def speculating(drafter: str, size: int, *, adaptive: bool = False, **settings: Any) -> LLM:
    config = {**DRAFTERS[drafter], "num_speculative_tokens": size, "adaptive": adaptive}
    return LLM("tiny", **{**SETTINGS, **settings}, speculative_config=config)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def check_equal(stack: ExitStack, drafter: str, size: int, room: str) -> None:
    expected, sequences = plain()
    if drafter in SHARES_RIGHT:
        stack.enter_context(drafting_with(sequences, SHARES_RIGHT[drafter]))
    settings = dict(ROOMS[room])
    if room == "crowded" and drafter == "colocated":
        settings["kv_cache_memory_bytes"] += 6 * DRAFT_BLOCK_BYTES
    llm = stack.enter_context(speculating(drafter, size, **settings))
    assert run(llm) == expected
    found = counted(llm)
    assert found["spec_decode_num_draft_tokens"] > 0
    if room == "crowded" and drafter != "oracle":  # which is finished before others interfere
        assert found["num_preemptions"] > 0
    if drafter != "random":
        assert found["spec_decode_num_accepted_tokens"] > 0
    assert run(llm, alone=True) == expected


@pytest.mark.parametrize(("drafter", "size", "room"), COVERING)
def test_on_equals_off(stack: ExitStack, drafter: str, size: int, room: str) -> None:
    check_equal(stack, drafter, size, room)


@pytest.mark.product
@pytest.mark.parametrize(("drafter", "size", "room"), PRODUCT)
def test_on_equals_off_in_every_combination(stack: ExitStack, drafter: str, size: int, room: str) -> None:
    check_equal(stack, drafter, size, room)


@pytest.mark.parametrize("drafter", ["ngram", "suffix", "colocated", "worker"])
def test_adaptive_lengths_change_nothing(stack: ExitStack, monkeypatch: pytest.MonkeyPatch, drafter: str) -> None:
    # where drafts cost what they do on a CPU, a draft model would hardly be asked
    monkeypatch.setattr("sempre.engine.speculation.speculation.draft_costs", lambda *_, **__: DraftCosts(0.1, 0.0, 0.1))
    monkeypatch.setattr("sempre.engine.speculation.SpeculationPlan.observe", lambda *_: None)
    llm = stack.enter_context(speculating(drafter, 7, adaptive=True))
    assert run(llm) == plain()[0]
    found = counted(llm)
    assert 0 < found["spec_decode_num_draft_tokens"] < 7 * found["spec_decode_num_drafts"]


def test_the_ordinary_matmul_fails(stack: ExitStack) -> None:
    """The control: with a matmul whose bits depend on the number of rows, speculation changes the output."""
    kinds = ("plain",)
    expected, sequences = plain("control", kinds)
    stack.enter_context(drafting_with(sequences, 1.0))
    llm = stack.enter_context(speculating("oracle", 4, numerics="control"))
    assert run(llm, kinds, alone=True) != expected


def test_accepting_wrong_drafts_fails(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of this file: a verification that keeps a token after a wrong draft is noticed."""
    right = runner.verified

    def careless(request_id: str, drafts: list[int], rows: list[Any], rank: int) -> Any:
        result = right(request_id, [row.token_id for row in rows[:-1]], rows, rank)
        return result if len(result.token_ids) > 1 else right(request_id, drafts, rows, rank)

    monkeypatch.setattr(runner, "verified", careless)
    monkeypatch.setattr("sempre.engine.scheduling.planned_step.follows_drafts", lambda *_: True)
    stack.enter_context(drafting_with(plain()[1], 0.5))
    llm = stack.enter_context(speculating("half", 4))
    assert run(llm) != plain()[0]


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.product] if size in (2, 7) else []) for size in SIZES]
)
def test_an_oracle_gives_one_token_more_than_it_drafts_per_step(stack: ExitStack, size: int) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=1 + 3 * (size + 1), ignore_eos=True)
    with LLM("tiny", **SETTINGS) as llm:
        expected = llm.generate(PROMPTS[1], params, use_tqdm=False)[0]
    whole = expected.prompt_token_ids + expected.outputs[0].token_ids
    stack.enter_context(drafting_with([whole], 1.0))
    llm = stack.enter_context(speculating("oracle", size))
    assert llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0].token_ids == expected.outputs[0].token_ids
    found = counted(llm)
    assert found["iterations"] == 1 + 3  # the prompt gives the first token
    assert found["spec_decode_num_drafts"] == 3
    assert found["spec_decode_num_draft_tokens"] == found["spec_decode_num_accepted_tokens"] == 3 * size
    assert [found[f"spec_decode_num_accepted_tokens_per_pos{i}"] for i in range(size)] == [3] * size


def test_a_request_that_cannot_go_on_fails_as_without(stack: ExitStack) -> None:
    """Where nothing is left to sample, the error comes at the same token, not at a draft that is not reached."""
    llm = stack.enter_context(speculating("colocated", 4))
    off = stack.enter_context(LLM("tiny", **SETTINGS))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, allowed_token_ids=[5], bad_words=[])
    prompt = {"prompt_token_ids": [5, 6, 7]}
    tokens = [engine.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for engine in (off, llm)]
    assert tokens[0] == tokens[1] == [5] * 12


def test_prefix_blocks_hold_accepted_tokens_only(stack: ExitStack) -> None:
    """A second request whose prompt is the whole first one reads its blocks, and gives the same as a cold one."""
    off = stack.enter_context(LLM("tiny", **SETTINGS, enable_prefix_caching=False))
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, logprobs=1, ignore_eos=True)
    expected = off.generate(PROMPTS[0], params, use_tqdm=False)[0]
    whole = expected.prompt_token_ids + expected.outputs[0].token_ids
    stack.enter_context(drafting_with([whole], 0.5))
    llm = stack.enter_context(speculating("half", 7))
    first = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    assert facts(first.outputs[0]) == facts(expected.outputs[0])
    found = counted(llm)
    assert 0 < found["spec_decode_num_accepted_tokens"] < found["spec_decode_num_draft_tokens"]
    again = {"prompt_token_ids": whole}
    warm = llm.generate(again, replace(params, seed=2), use_tqdm=False)[0]
    assert warm.num_cached_tokens >= 48
    assert facts(warm.outputs[0]) == facts(off.generate(again, replace(params, seed=2), use_tqdm=False)[0].outputs[0])


def test_a_block_that_ends_with_a_rejected_draft_is_not_read(stack: ExitStack) -> None:
    """A request stops at a token that was sampled in place of a rejected draft, at the end of a block."""
    off = stack.enter_context(LLM("tiny", **SETTINGS, enable_prefix_caching=False))
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, logprobs=1, ignore_eos=True)
    expected = off.generate(PROMPTS[0], params, use_tqdm=False)[0]
    start = len(expected.prompt_token_ids)
    whole = expected.prompt_token_ids + expected.outputs[0].token_ids
    end = next(end for end in range(start + 1, len(whole)) if end % 16 == 0 and whole[end - 1] not in whole[: end - 1])
    stack.enter_context(drafting_with([whole], 0.0))
    llm = stack.enter_context(speculating("random", 4))
    first = llm.generate(PROMPTS[0], replace(params, stop_token_ids=[whole[end - 1]]), use_tqdm=False)[0]
    assert first.outputs[0].token_ids == whole[start:end]
    assert counted(llm)["spec_decode_num_draft_tokens"] > 0
    again = {"prompt_token_ids": [*whole[:end], 5, 6]}
    warm = llm.generate(again, replace(params, seed=2), use_tqdm=False)[0]
    cold = off.generate(again, replace(params, seed=2), use_tqdm=False)[0]
    assert facts(warm.outputs[0]) == facts(cold.outputs[0])
    assert warm.num_cached_tokens == end - 16, "keys and values of the last token were never computed"
