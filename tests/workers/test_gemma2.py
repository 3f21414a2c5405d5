"""Gemma 2: what its config may say, and what each part of it does to the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sempre.ipc.errors import ModelError
from sempre.workers.models.registry import parse_spec

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
}


def test_what_the_family_takes_for_granted() -> None:
    spec: Any = parse_spec(CONFIG, {})
    assert spec.windows == (8, None, 8)
    assert spec.one_layer_per_kind().windows == (8, None)
    assert spec.tie_word_embeddings
    assert (spec.query_scale, spec.attention_cap, spec.logit_cap) == (256**-0.5, 50.0, 30.0)
    without: Any = parse_spec({**CONFIG, "attn_logit_softcapping": None, "final_logit_softcapping": None}, {})
    assert (without.attention_cap, without.logit_cap) == (None, None)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_activation", "gelu", "'gelu_pytorch_tanh'"),
        ("query_pre_attn_scalar", 0, "a finite number greater than 0"),
        ("attn_logit_softcapping", -1.0, "a finite number greater than 0"),
        ("final_logit_softcapping", "30", "a finite number greater than 0"),
        ("sliding_window", None, "a number of keys, as layers have a window"),
        ("use_bidirectional_attention", True, "false"),
        ("layer_types", ["full_attention"] * 3, "what the sliding-window fields imply"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(field: str, value: object, expected: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {field}: expected {expected}"):
        parse_spec({**CONFIG, field: value}, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("attn_logit_softcapping", None), ("final_logit_softcapping", None), ("query_pre_attn_scalar", 100)],
)
def test_every_field_reaches_the_logits(
    field: str, value: object, checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    from sempre.ipc.messages import SamplingSpec

    folder = checkpoints("gemma2").folder
    request = prompt("a", list(range(3, 60)), SamplingSpec(max_tokens=3, temperature=0.0, logprobs=3))
    expected = serve(folder).run(request)["a"]
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, field: value}))
    assert serve(tmp_path / "other").run(request)["a"].logprobs != expected.logprobs
