"""The sampler's GPU kernels in Triton's interpreter, against the CPU kernels, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grammars import VOCABULARY
from sampling_cases import (
    EXTREME,
    PARAMETERS,
    WITH_GRAMMAR,
    disagreements,
    make_logits,
    make_states,
    run,
    verification_disagreements,
)

from sempre.ipc.config import LogprobsMode
from sempre.workers.sampling import Sampler, reports_of

CPU = torch.device("cpu")
TRUNCATING = [values for values in PARAMETERS if {"top_k", "top_p", "min_p"} & values.keys()]

# whose rows depend on the drafts before them, and two that do not
HISTORIES = {"repetition_penalty", "frequency_penalty", "bad_words_token_ids", "min_tokens"}
VERIFYING = [{}, {"top_k": 5, "logprobs": 3}, *[values for values in PARAMETERS if HISTORIES & values.keys()]]

REPORTING: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 3},
    {"min_p": 0.02, "top_p": 0.7, "top_k": 40, "temperature": 0.6, "logprobs": 2},
    {"logit_bias": {7: 3.5, 11: -100.0, 0: 0.25}, "top_k": 3, "logprobs": 5},
    {"temperature": 1.3, "logprobs": 0},
    {"logprobs": -1, "presence_penalty": 1.5, "top_p": 0.9},
    {"temperature": 0.7},
]


@pytest.mark.parametrize(
    ("kind", "vocab_size", "parameters"),
    [
        pytest.param("flat", 200, TRUNCATING[1:5], marks=pytest.mark.product),
        ("tied", 130, PARAMETERS),
        ("huge", 130, EXTREME),
    ],
    ids=["narrowing", "every stage", "the ends of float32"],
)
def test_equals_the_cpu(kind: str, vocab_size: int, parameters: list[dict[str, Any]]) -> None:
    from sempre.kernels.sampling.gpu import Tiles

    # small enough that searches narrow the interval before they list
    tiles = Tiles(noise=128, logprobs=128, edits=256, phrases=2, cut=256, cut_piece=256, cut_sample=2, cut_list=16)
    assert disagreements(CPU, kind, vocab_size, steps=1, seed=vocab_size, parameters=parameters, tiles=tiles) == []


def test_verification_equals_decoding_one_by_one_on_the_cpu() -> None:
    from sempre.kernels.sampling.gpu import Tiles

    tiles = Tiles(noise=128, logprobs=128, edits=256, phrases=2, cut=256, cut_piece=256, cut_sample=2, cut_list=16)
    assert verification_disagreements(CPU, 130, seed=3, parameters=VERIFYING, tiles=tiles) == []


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_what_is_reported_equals_the_cpu(mode: LogprobsMode) -> None:
    """Best tokens of kernels and of the host, beside rows without, and rows that verify drafts."""
    from sempre.kernels.sampling.gpu import Tiles

    tiles = Tiles(noise=128, logprobs=128, edits=256, phrases=2, cut=256, cut_piece=256, cut_sample=2, cut_list=16)
    reports = reports_of(mode)
    options: dict[str, Any] = {"tiles": tiles, "reports": reports}
    assert disagreements(CPU, "tied", 130, steps=1, seed=5, parameters=REPORTING, **options) == []
    assert verification_disagreements(CPU, 130, seed=3, parameters=REPORTING[:4], **options) == []


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_a_batch_whose_best_tokens_are_all_computed_on_the_host(mode: LogprobsMode) -> None:
    parameters = [{"logprobs": 30, "top_k": 3, "temperature": 0.7}, {"logprobs": -1, "logit_bias": {3: 2.0}}]
    assert disagreements(CPU, "flat", 130, steps=2, seed=7, parameters=parameters, reports=reports_of(mode)) == []


def test_logits_of_a_prompt_equal_the_cpu() -> None:
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    reports = reports_of("raw_logits")
    sampler = GpuSampler(device=CPU, vocab_size=130, max_num_seqs=4, num_slots=4, reports=reports)
    logits = make_logits("tied", 4, 130, seed=2)
    for num_best in (0, 3, -1):
        found = sampler.prompt_logprobs(logits, [1, 2, 3, 129], num_best)
        assert found == Sampler(reports).prompt_logprobs(logits, [1, 2, 3, 129], num_best)
        assert found != Sampler().prompt_logprobs(logits, [1, 2, 3, 129], num_best)


def test_a_grammar_masks_as_on_the_cpu() -> None:
    """Token by token: the mask of a slot is rewritten for each."""
    batch = [*WITH_GRAMMAR, {}]
    assert disagreements(CPU, "flat", VOCABULARY, steps=2, seed=1, parameters=batch) == []


def test_a_grammar_in_error_fails_its_row_alone() -> None:
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    states = make_states([{"grammar": "start: <|nobody|>", "eos_token_ids": [0]}, {"temperature": 0.0}], seed=1)
    sampler = GpuSampler(device=CPU, vocab_size=VOCABULARY, max_num_seqs=2, num_slots=2)
    for slot, state in enumerate(states):
        sampler.admit(slot, state)
    logits = make_logits("flat", 2, VOCABULARY, seed=1)
    failed, healthy = run(sampler, CPU, logits, states)
    assert failed.error is not None
    assert failed.error.facts["parameter"] == "structured_outputs"
    assert healthy.token_id == int(logits[1].argmax())
