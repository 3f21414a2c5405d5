"""Speculative samples follow the target's distribution: a chi-square test over many seeds."""

from __future__ import annotations

from itertools import product
from math import exp

import pytest
from scipy.stats import chisquare

from sempre.engine import LLM, Counter, SamplingParams

PROMPT = "The captain of the ship"
NUM_SEEDS = 1500
TOP_K = 3
LENGTH = 3
SIGNIFICANCE = 1e-3


def probabilities(llm: LLM, temperature: float) -> dict[tuple[int, ...], float]:
    """Of every output of LENGTH tokens under top_k, by the chain rule from reported log-probabilities."""
    prompt = llm.get_tokenizer().encode(PROMPT)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        prefixes = list(found)
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=TOP_K)
        outputs = llm.generate([[*prompt, *prefix] for prefix in prefixes], params, use_tqdm=False)
        longer = {}
        for prefix, output in zip(prefixes, outputs, strict=True):
            assert output.outputs[0].logprobs is not None
            best = output.outputs[0].logprobs[0]
            weights = {token: exp(row.logprob / temperature) for token, row in best.items()}
            for token, weight in weights.items():
                longer[(*prefix, token)] = found[prefix] * weight / sum(weights.values())
        found = longer
    return found


def test_samples_follow_the_distribution() -> None:
    drafting = {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 2, "adaptive": False}
    settings = {"multiprocessing": False, "num_threads": 1, "max_model_len": 64}
    with LLM("tiny", **settings, speculative_config=drafting) as llm:  # type: ignore[arg-type]
        right, wrong = probabilities(llm, 1.0), probabilities(llm, 1.3)
        params = [
            SamplingParams(temperature=1.0, top_k=TOP_K, max_tokens=LENGTH, seed=seed, ignore_eos=True)
            for seed in range(NUM_SEEDS)
        ]
        outputs = llm.generate([PROMPT] * NUM_SEEDS, params, use_tqdm=False)
        accepted = {m.labels.get("position"): m.value for m in llm.get_metrics() if "per_pos" in m.name}  # type: ignore[attr-defined]
    assert accepted["0"] > NUM_SEEDS / 5, "many samples are drafts that were kept"
    samples = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert set(samples) <= set(right)

    def p_value(expected: dict[tuple[int, ...], float]) -> float:
        # rare outputs are one category, so that every expected count is at least 5
        common = [key for key in expected if expected[key] * NUM_SEEDS >= 5]
        counts = [samples.count(key) for key in common]
        means = [expected[key] * NUM_SEEDS for key in common]
        if len(common) < len(expected):
            counts.append(NUM_SEEDS - sum(counts))
            means.append(NUM_SEEDS - sum(means))
        return float(chisquare(counts, means).pvalue)

    assert len(right) == len(list(product(range(TOP_K), repeat=LENGTH)))
    assert p_value(right) > SIGNIFICANCE
    assert p_value(wrong) < 1e-6, "the control: another temperature's distribution is told apart"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drafts_are_samples_too(seed: int) -> None:
    """When the draft model is the target itself, every draft is accepted: it samples with the same noise."""
    drafting = {"method": "draft_model", "model": "tiny", "num_speculative_tokens": 4, "adaptive": False}
    settings = {"multiprocessing": False, "num_threads": 1, "max_model_len": 64}
    params = SamplingParams(
        temperature=1.2, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=seed, max_tokens=1 + 3 * 5, ignore_eos=True
    )
    with LLM("tiny", **settings, speculative_config=drafting) as llm:  # type: ignore[arg-type]
        llm.generate(PROMPT, params, use_tqdm=False)
        counts = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter) and "per_pos" not in m.name}
    assert counts["sempre:spec_decode_num_draft_tokens"] == counts["sempre:spec_decode_num_accepted_tokens"] == 12
    assert counts["sempre:iterations"] == 4
