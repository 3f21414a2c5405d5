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

CPU = torch.device("cpu")
TRUNCATING = [values for values in PARAMETERS if {"top_k", "top_p", "min_p"} & values.keys()]

# whose rows depend on the drafts before them, and two that do not
HISTORIES = {"repetition_penalty", "frequency_penalty", "bad_words_token_ids", "min_tokens"}
VERIFYING = [{}, {"top_k": 5, "logprobs": 3}, *[values for values in PARAMETERS if HISTORIES & values.keys()]]


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
