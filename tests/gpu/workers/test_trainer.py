"""The trainer on a GPU: its log-probabilities are those that an engine reports, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sempre.engine import LLM, SamplingParams
from sempre.workers.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logprobs_have_the_bits_of_the_engine(dtype: Any) -> None:
    """Sequences of mixed lengths, sampled by an engine with prefixes in its cache; gradients are finite."""
    prompts: list[Any] = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (90, 3, 90, 200, 17)]
    params = SamplingParams(max_tokens=40, logprobs=0, ignore_eos=True, seed=1)
    with LLM("tiny", device="cuda", multiprocessing=False, dtype=dtype, max_model_len=512) as llm:
        outputs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)][1]
        folder, parts = llm.model_folder, llm.fingerprint_parts
    assert any(output.num_cached_tokens for output in outputs)
    trainer = Trainer(folder, dtype=dtype, device="cuda", max_model_len=512)
    trainer.check_engine(parts)
    sequences = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    lengths = list(map(len, sequences))
    found = trainer.packed(torch.tensor([token for sequence in sequences for token in sequence]), lengths)
    for output, own in zip(outputs, found.detach().cpu().split(lengths), strict=True):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        reported = [row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert own[len(output.prompt_token_ids) :].tolist() == reported
    found.sum().backward()
    assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in trainer.parameters())
