"""Sampled frequencies, ties, masks and seeds of `sample`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import sampling_reference as reference
import torch
from scipy import stats

from sempre.kernels.sampling import SamplingRows, sample

DRAWS = 20_000


def _rows(count: int, *, seeds: object = None, **changes: float) -> SamplingRows:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes
    columns = {name: [value] * count for name, value in settings.items()}
    return SamplingRows.of(seeds=[0] * count if seeds is None else seeds, **columns)


def _p_value(token_ids: npt.NDArray[np.int32], probability: npt.NDArray[np.float64]) -> float:
    """Chi-square of the frequencies; ids expected fewer than 5 times are pooled, impossible ones must not occur."""
    counts = np.bincount(token_ids, minlength=probability.size)
    assert counts[probability == 0].sum() == 0
    expected = probability * token_ids.size
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
        observed_total = observed.sum()
        wanted = wanted * observed_total / wanted.sum()
    return float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_frequencies_are_the_softmax_probabilities(changes: dict[str, float], vary: str) -> None:
    logits = (np.random.default_rng(3).standard_normal(100) * 1.5).astype(np.float32)
    scaled = logits / np.float32(changes.get("temperature", 1.0))
    keep = reference.truncated(
        scaled, top_k=int(changes.get("top_k", 0)), top_p=changes.get("top_p", 1.0), min_p=changes.get("min_p", 0.0)
    )
    probability = np.where(keep, np.exp(reference.log_softmax(scaled)), 0.0)
    probability /= probability.sum()
    many = np.arange(DRAWS)
    rows = _rows(DRAWS, seeds=(many << 31) + 1 if vary == "seed" else None, **changes)
    positions = many if vary == "position" else np.full(DRAWS, 9)
    found = sample(torch.from_numpy(np.tile(logits, (DRAWS, 1))), rows, positions)
    assert _p_value(found.token_ids, probability) > 1e-3


def test_control_biased_noise_fails_the_frequency_test() -> None:
    logits = (np.random.default_rng(3).standard_normal(100) * 1.5).astype(np.float32)
    probability = np.exp(reference.log_softmax(logits))
    noise = np.stack([reference.gumbel_noise(0, position, 100) for position in range(4000)])
    unbiased = np.argmax(logits + noise, axis=1).astype(np.int32)
    biased = np.argmax(logits + noise * np.float32(1.25), axis=1).astype(np.int32)
    assert _p_value(unbiased, probability) > 1e-3
    assert _p_value(biased, probability) < 1e-6


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000, 8192, 20_001])
def test_tokens_equal_the_reference(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    logits = generator.standard_normal((6, vocab_size)).astype(np.float32) * np.float32(2)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    positions = np.array([0, 1, 2, 1000, 2**31, 2**32 - 1])
    found = sample(torch.from_numpy(logits.copy()), _rows(6, seeds=seeds, temperature=0.7), positions)
    keep = np.ones(vocab_size, np.bool_)
    for row in range(6):
        scaled = logits[row] / np.float32(0.7)
        assert found.token_ids[row] == reference.sample(scaled, seeds[row], int(positions[row]), keep)


def test_seeds_that_differ_in_the_high_word_differ() -> None:
    logits = torch.zeros(3, 4096)
    tokens = sample(logits, _rows(3, seeds=[5, 5 + 2**32, 5 + 2**40]), np.zeros(3, np.int64)).token_ids
    assert len(set(tokens.tolist())) == 3


@pytest.mark.parametrize("vocab_size", [5, 200, 20_001])
def test_greedy_ties_go_to_the_lowest_id(vocab_size: int) -> None:
    logits = torch.full((4, vocab_size), -1.0)
    logits[1, [vocab_size - 1, vocab_size // 2, 3]] = 2.5
    logits[2, [vocab_size - 1, vocab_size - 2]] = 2.5
    logits[3] = 0.0
    logits[3, 0] = -0.0
    found = sample(logits, _rows(4, temperature=0.0), np.zeros(4, np.int64))
    assert found.token_ids.tolist() == [0, min(3, vocab_size // 2), vocab_size - 2, 0]


def test_top_k_1_is_greedy() -> None:
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    greedy = sample(logits.clone(), _rows(64, temperature=0.0), np.arange(64)).token_ids
    single = sample(logits.clone(), _rows(64, temperature=1.5, top_k=1), np.arange(64)).token_ids
    assert np.array_equal(single, greedy)


def test_minus_infinity_is_never_sampled() -> None:
    logits = torch.full((500, 1000), -torch.inf)
    logits[:, [7, 70, 700]] = torch.tensor([0.0, 1.0, -30.0])
    for changes in ({}, {"top_k": 10}, {"top_p": 0.999}, {"min_p": 0.5}, {"temperature": 0.0}):
        found = sample(logits.clone(), _rows(500, **changes), np.arange(500))
        assert set(found.token_ids.tolist()) <= {7, 70, 700}
        assert np.isfinite(found.values).all()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_rows_without_a_distribution_are_marked(changes: dict[str, float]) -> None:
    logits = torch.zeros(4, 9000)
    logits[0, 8999] = torch.nan
    logits[1, 4] = torch.inf
    logits[2] = -torch.inf
    found = sample(logits, _rows(4, **changes), np.zeros(4, np.int64))
    assert found.values[:3].tolist() == [np.inf, np.inf, -np.inf]
    assert np.isfinite(found.values[3])


def test_wrong_logits_are_refused() -> None:
    for logits in (torch.zeros(4), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, 2).T, torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="logits: expected"):
            sample(logits, _rows(2), np.zeros(2, np.int64))
