"""What every family must do: greedy tokens of transformers, bits among others, defaults and refusals of its config."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sempre.ipc.errors import ModelError
from sempre.ipc.messages import SamplingSpec
from sempre.workers.models.registry import parse_spec

GREEDY = SamplingSpec(max_tokens=64, temperature=0.0, logprobs=4, prompt_logprobs=4)

FAMILIES = ["qwen3-moe-odd", "qwen3-moe-step", "qwen2-moe", "qwen2-moe-odd", "mixtral", "mixtral-odd"]


def prompt_ids(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def logprob_bits(finished: Any) -> bytes:
    """Of prompt and output, however they were spread over steps."""
    assert finished.errors == []
    return b"".join(part.logprobs for part in [*finished.prompt_logprobs, *finished.logprobs])


def alone_and_among_others(serving: Any, prompt: Any) -> tuple[Any, Any]:
    wanted = prompt("wanted", prompt_ids(41), GREEDY)
    others = [prompt(f"{i}", prompt_ids(1 + 9 * i, salt=i + 1), GREEDY, chunks=(1 + 3 * i,)) for i in range(5)]
    cut = prompt("wanted", wanted.token_ids, GREEDY, chunks=(7, 1, 16))
    return serving.run(wanted)["wanted"], serving.run(*others[:2], cut, *others[2:])["wanted"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_and_bits_their_own(
    family: str, checkpoints: Any, serve: Any, prompt: Any
) -> None:
    checkpoint = checkpoints(family)
    alone, among_others = alone_and_among_others(serve(checkpoint.folder), prompt)
    assert (among_others.token_ids, logprob_bits(among_others)) == (alone.token_ids, logprob_bits(alone))
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([prompt_ids(41) + alone.token_ids])).logits[0]
    assert alone.token_ids == logits[40:-1].argmax(-1).tolist()
    # decode is what prefill is
    params = SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=4)
    whole = serve(checkpoint.folder).run(prompt("whole", prompt_ids(41) + alone.token_ids, params))["whole"]
    assert logprob_bits(whole)[: len(logprob_bits(alone))] == logprob_bits(alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_control(family: str, checkpoints: Any, serve: Any, prompt: Any) -> None:
    """Ordinary matmuls give a row other bits among others: the test above can fail."""
    alone, among_others = alone_and_among_others(serve(checkpoints(family).folder, numerics="control"), prompt)
    assert logprob_bits(among_others) != logprob_bits(alone)


DEFAULTS = {
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "Qwen2MoeForCausalLM": transformers.Qwen2MoeConfig,
    "MixtralForCausalLM": transformers.MixtralConfig,
}


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    full = json.loads(DEFAULTS[architecture]().to_json_string(use_diff=False))
    names = {"architectures": [architecture]}
    assert parse_spec(names, {}) == parse_spec({**full, **names}, {})


REFUSED = [
    (
        "Qwen2MoeForCausalLM",
        "num_experts_per_tok",
        61,
        "num_experts_per_tok: expected at most num_experts=60",
    ),
    ("Qwen2MoeForCausalLM", "shared_expert_intermediate_size", 8, "shared_expert_intermediate_size: expected a multi"),
    ("Qwen2MoeForCausalLM", "qkv_bias", "yes", "qkv_bias: expected true or false"),
    ("Qwen2MoeForCausalLM", "norm_topk_prob", 1, "norm_topk_prob: expected true or false"),
    ("Qwen2MoeForCausalLM", "decoder_sparse_step", 0, "decoder_sparse_step: expected an integer of at least 1"),
    ("Qwen2MoeForCausalLM", "mlp_only_layers", ["0"], "mlp_only_layers: expected a list of layers"),
    ("Qwen2MoeForCausalLM", "use_sliding_window", True, "use_sliding_window: expected false for this architecture"),
    (
        "MixtralForCausalLM",
        "num_local_experts",
        1,
        "num_experts_per_tok: expected at most num_local_experts=1",
    ),
    ("MixtralForCausalLM", "num_local_experts", 10**6, "num_local_experts: expected an integer of at most 4096"),
    ("MixtralForCausalLM", "hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("MixtralForCausalLM", "intermediate_size", 24, "intermediate_size: expected a multiple of 16"),
    ("MixtralForCausalLM", "layer_types", ["linear_attention"], "layer_types: expected what the sliding-window"),
    ("MixtralForCausalLM", "partial_rotary_factor", 0.5, "partial_rotary_factor: expected 1.0"),
]


@pytest.mark.parametrize(("architecture", "field", "value", "expected"), REFUSED)
def test_what_is_not_honoured_is_refused_by_name(architecture: str, field: str, value: object, expected: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {expected}"):
        parse_spec({"architectures": [architecture], field: value}, {})
