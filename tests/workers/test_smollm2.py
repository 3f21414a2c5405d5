"""A real checkpoint through the whole worker, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gguf_files import transformers_llama

from sempre.engine.models import resolve_model
from sempre.ipc.messages import SamplingSpec

VOCAB_SIZE = 49152


def test_values_equal_transformers(serve: Any, dense: Callable[..., torch.Tensor], prompt: Any) -> None:
    folder = resolve_model("smollm2-135m").path
    ids = [1, 4093, 198, *range(1000, 1060)]
    params = SamplingSpec(max_tokens=4, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
    serving = serve(folder, dtype="float32", max_num_seqs=8, max_model_len=256)
    found = serving.run(prompt("whole", ids, params))["whole"]
    cut = serving.run(prompt("cut", ids, params, chunks=(17, 30)))["cut"]
    assert cut.token_ids == found.token_ids

    reference = transformers_llama(folder)
    with torch.no_grad():
        logits = reference(torch.tensor([ids + found.token_ids])).logits[0, :-1]
    expected = torch.log_softmax(logits.double(), dim=-1)
    rows = torch.cat([dense(found.prompt_logprobs, VOCAB_SIZE), dense(found.logprobs, VOCAB_SIZE)])
    assert float((rows.double() - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(rows, torch.cat([dense(cut.prompt_logprobs, VOCAB_SIZE), dense(cut.logprobs, VOCAB_SIZE)]))
