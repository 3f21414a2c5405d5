"""Log-probabilities of a long prompt against the same model computed in float64, angles of the rotation included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from sempre.engine import LLM, SamplingParams
from sempre.kernels.rope import RopeSpec, cos_sin_table

# the widths of Qwen2-0.5B
CONFIG: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 3,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
NUM_TOKENS = 900


def reference_model(generator: torch.Generator) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.dim() == 1:
                values.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 0.1 if "embed" in name else 1 / math.sqrt(values.shape[1])
                values.normal_(0.0, scale, generator=generator)
    return model


def scores(model: Qwen2ForCausalLM, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_a_long_prompt_is_within_1e_5_of_float64(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    model = reference_model(generator)
    tensors = {name: values.clone() for name, values in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    words = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **words, "hidden_act": "silu", "eos_token_id": 1}))
    token_ids = torch.randint(2, 2000, (NUM_TOKENS,), generator=generator).tolist()
    table = cos_sin_table(RopeSpec(head_dim=64, theta=1e6), NUM_TOKENS).double()
    rotation = tuple(torch.cat([half, half], 1)[None] for half in table.chunk(2, dim=1))
    model.model.rotary_emb.forward = lambda x, position_ids: tuple(part.to(x.dtype) for part in rotation)
    narrow = scores(model, token_ids)
    expected = scores(model.double(), token_ids)
    with LLM(
        str(tmp_path), multiprocessing=False, dtype="float32", max_model_len=1024, skip_tokenizer_init=True
    ) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    rows = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
    found = torch.tensor([row[token_id].logprob for row, token_id in rows if row], dtype=torch.float64)
    error, error_of_float32 = (found - expected).abs(), (narrow - expected).abs()
    assert expected.min() < -12
    assert error.max() < 1e-5
    # as near as the blocked sums of an ordinary library, which the sum in one chain is not
    assert error.mean() < 1.2 * error_of_float32.mean()
