"""Requests with finite values keep their bits next to requests, and after drafts, that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from surfaces import Facts, facts
from tiny_variants import with_embeddings
from workload import KV_BLOCK_BYTES

from sempre.engine import LLM, SamplingParams
from sempre.engine.speculation import speculation

BROKEN = {77: float("nan"), 78: float("inf")}
PARAMS = SamplingParams(temperature=0.9, seed=11, max_tokens=20, logprobs=2, ignore_eos=True)
SETTINGS: dict[str, Any] = {"multiprocessing": False, "num_threads": 1, "max_model_len": 192}
WAYS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunks": {"max_num_batched_tokens": 37},
    "preemption": {"kv_cache_memory_bytes": 16 * KV_BLOCK_BYTES},
    "no prefix cache": {"enable_prefix_caching": False},
}


def prompt(start: int, length: int) -> list[int]:
    return [100 + (start * 7919 + j * 104729) % 3900 for j in range(length)]


FINITE = [prompt(i, length) for i, length in enumerate((3, 16, 64, 65, 130))]
# some begin like a finite one, so that its blocks are shared
MIXED = [request for i, tokens in enumerate(FINITE) for request in (tokens, [*tokens[:-2], 77 + i % 2, *tokens[-2:]])]


class BrokenDrafter:
    """Always drafts tokens whose embedding is not finite."""

    def extend(self, token_ids: Sequence[int]) -> None:
        pass

    def propose(self, count: int) -> list[int]:
        return [77 + i % 2 for i in range(count)]

    def finish(self, num_prompt_tokens: int) -> None:
        pass


@contextmanager
def broken_drafts() -> Iterator[None]:
    before = speculation.DRAFTERS["ngram"]
    speculation.DRAFTERS["ngram"] = lambda config: lambda cache_salt: BrokenDrafter()
    try:
        yield
    finally:
        speculation.DRAFTERS["ngram"] = before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_embeddings(tmp_path_factory.mktemp("models") / "broken", BROKEN))


@pytest.fixture(scope="module")
def alone(model: str) -> list[Facts]:
    with LLM(model, **SETTINGS) as llm:
        return [generate(llm, [tokens])[0] for tokens in FINITE]


def generate(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    """The facts of each request, or the type of its error."""
    completions = [output.outputs[0] for output in llm.generate(prompts, PARAMS, use_tqdm=False)]
    return [facts(c) if c.error is None else c.finish_reason for c in completions]


@pytest.mark.parametrize("way", WAYS)
def test_next_to_requests_that_are_not_finite(model: str, alone: list[Facts], way: str) -> None:
    with LLM(model, **SETTINGS | WAYS[way]) as llm:
        for _ in range(2):  # the second time with what the first left in the cache
            results = generate(llm, MIXED)
            assert results[::2] == alone
            assert results[1::2] == ["error"] * len(FINITE)


def test_after_drafts_that_are_not_finite(model: str, alone: list[Facts]) -> None:
    drafting = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    with broken_drafts(), LLM(model, **SETTINGS, speculative_config=drafting) as llm:
        assert generate(llm, FINITE) == alone
        found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert found["sempre:spec_decode_num_draft_tokens"] > 0
