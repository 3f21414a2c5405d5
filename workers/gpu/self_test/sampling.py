"""Self-test of the sampler: a request alone, with the stages it needs, and in a batch that runs every stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sempre.ipc.messages import SamplingSpec
from sempre.workers.sampling import RowResult
from sempre.workers.sampling.gpu_sampler import GpuSampler
from sempre.workers.sampling.state import SamplingState
from sempre.workers.self_test import Comparison

PROMPT = [0, 1, 0]
PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "logprobs": 5},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.01, "logprobs": 0},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 20},
    {"temperature": 0.0, "presence_penalty": 0.5, "bad_words_token_ids": [[1], [0, 1]]},
    {"temperature": 0.9, "logit_bias": {1: 2.0}, "top_p": 0.95, "top_k": 100},
)


def check_sampling(vocab_size: int, device: torch.device) -> Iterator[Comparison]:
    """Tokens and log-probabilities over this model's vocabulary."""
    count = len(PARAMETERS)
    sampler = GpuSampler(device=device, vocab_size=vocab_size, max_num_seqs=count, num_slots=count)
    generator = torch.Generator(device).manual_seed(0x5E3F)
    logits = torch.randn(count, vocab_size, generator=generator, dtype=torch.float32, device=device) * 3.0
    together = _sample(sampler, logits, list(range(count)))
    for row in range(count):
        alone = _sample(sampler, logits, [row])[0]
        different = torch.tensor(int(alone != together[row]), dtype=torch.int64, device=device)
        what = f"{PARAMETERS[row]} alone against a batch of {count}"
        yield Comparison(f"sampling [V={vocab_size}]", what, different, 1)


def _sample(sampler: GpuSampler, logits: torch.Tensor, rows: list[int]) -> list[RowResult]:
    states = []
    for row in rows:
        spec = SamplingSpec(max_tokens=4, **PARAMETERS[row])
        # admitted again: sampling advances the counts of penalties
        states.append(SamplingState(spec, row, list(PROMPT), len(PROMPT)))
        sampler.admit(row, states[-1])
    stages = sampler.prepare(rows)
    positions = torch.full((len(rows),), len(PROMPT), dtype=torch.int64, device=logits.device)
    wanted = logits[rows[0] : rows[-1] + 1]
    sampler.sample(wanted, positions, stages)
    return sampler.collect(sampler.start_copy(wanted, stages, states))
