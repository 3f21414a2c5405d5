"""The axes at contexts up to the model's length, where blocks, tiles of 64 keys, chunks and splits of 512 end.

Every position's log-probability is compared, so a fault at one position or boundary is noticed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from surfaces import facts
from tiny_variants import with_window
from workload import KV_BLOCK_BYTES

from sempre.engine import LLM, SamplingParams

LENGTH = 2048
SETTINGS: dict[str, Any] = {
    "multiprocessing": False,
    "num_threads": 2,
    "max_model_len": LENGTH,
    "enable_prefix_caching": False,
}
TEXT = [3 + (7 * 7919 + j * j * 31 + j * 104729) % 4000 for j in range(LENGTH - 1)]
SCORING = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
WINDOW = 200

# chunks end, and the next ones begin, on both sides of every boundary, and on it
CHUNKS = [512, 511, 513]
MORE_CHUNKS = [16, 17, 63, 64, 65, 128, 255, 256, 1023, 1024, 1025]
# decoding goes over these, from two tokens before
BOUNDARIES = (16, 64, 512, 1024, LENGTH - 4)


def scores(llm: LLM, text: list[int]) -> list[float]:
    rows = llm.generate({"prompt_token_ids": text}, SCORING, use_tqdm=False)[0].prompt_logprobs
    assert rows is not None
    return [row[token].logprob for token, row in zip(text[1:], rows[1:], strict=True) if row is not None]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_window(tmp_path_factory.mktemp("models") / "windowed", WINDOW))


@cache
def whole(model: str, numerics: str = "invariant") -> list[float]:
    """Of the text, computed in one step."""
    with LLM(model, **SETTINGS, max_num_batched_tokens=LENGTH, numerics=numerics) as llm:
        return scores(llm, TEXT)


@pytest.mark.parametrize("chunk", [*CHUNKS, *(pytest.param(chunk, marks=pytest.mark.product) for chunk in MORE_CHUNKS)])
def test_chunks(chunk: int) -> None:
    with LLM("tiny", **SETTINGS, max_num_batched_tokens=chunk) as llm:
        assert scores(llm, TEXT) == whole("tiny")


@pytest.mark.parametrize(
    "chunk",
    [WINDOW + 1, *(pytest.param(c, marks=pytest.mark.product) for c in (WINDOW, WINDOW - 1, *CHUNKS, *MORE_CHUNKS))],
)
def test_chunks_under_a_window(windowed: str, chunk: int) -> None:
    with LLM(windowed, **SETTINGS, max_num_batched_tokens=chunk) as llm:
        assert scores(llm, TEXT) == whole(windowed)
    assert whole(windowed) != whole("tiny")


def decoding(text_end: int) -> tuple[dict[str, list[int]], SamplingParams]:
    params = SamplingParams(temperature=1.0, seed=text_end, max_tokens=5, logprobs=0, ignore_eos=True)
    return {"prompt_token_ids": TEXT[: text_end - 2]}, params


@pytest.mark.parametrize("name", ["tiny", "windowed"])
def test_decoding_over_boundaries_gives_the_scores_of_the_whole(windowed: str, name: str) -> None:
    model = "tiny" if name == "tiny" else windowed
    with LLM(model, **SETTINGS, max_num_batched_tokens=512) as llm:
        prompts, params = zip(*map(decoding, BOUNDARIES), strict=True)
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        for output in outputs:
            tokens, rows = facts(output.outputs[0])
            scored = scores(llm, output.prompt_token_ids + tokens)
            assert [row[0][1] for row in rows] == scored[-len(tokens) :], len(output.prompt_token_ids)


def test_preemption_without_a_prefix_cache() -> None:
    """Long requests are evicted while decoding, and recomputed with their outputs."""
    ends = (500, 505, 511, 513)
    prompts, params = zip(*map(decoding, ends), strict=True)
    longer = [SamplingParams(temperature=1.0, seed=p.seed, max_tokens=40, logprobs=0, ignore_eos=True) for p in params]
    small = SETTINGS | {"max_model_len": 576}
    with LLM("tiny", **small) as llm:
        alone = [facts(llm.generate(p, s, use_tqdm=False)[0].outputs[0]) for p, s in zip(prompts, longer, strict=True)]
    with LLM("tiny", **small, kv_cache_memory_bytes=3 * 33 * KV_BLOCK_BYTES) as llm:
        together = [facts(output.outputs[0]) for output in llm.generate(list(prompts), longer, use_tqdm=False)]
        metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert metrics["sempre:num_preemptions"] > 0
    assert together == alone


def test_control_the_ordinary_matmul_differs() -> None:
    with LLM("tiny", **SETTINGS, max_num_batched_tokens=513, numerics="control") as llm:
        assert scores(llm, TEXT) != whole("tiny", "control")
