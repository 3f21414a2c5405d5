"""How long a context must be for attention to cost as much as the rest of a model."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.workers.device import attention_parity
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build
from sempre.workers.models.moe import MoeSpec
from sempre.workers.models.registry import build_model, load_spec
from sempre.workers.quantization.plain import NotQuantized


@pytest.fixture
def parity(checkpoints: Any) -> Any:
    def of(name: str) -> int | None:
        return attention_parity(build_model(Build(INVARIANT, NotQuantized()), load_spec(checkpoints(name).folder)))

    return of


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "qwen2-upper-window", "olmo3"])
def test_layers_with_a_window_do_not_grow(name: str, parity: Any, checkpoints: Any) -> None:
    spec = load_spec(checkpoints(name).folder)
    num_full = sum(window is None for window in spec.windows)
    if not num_full:
        assert parity(name) is None
        return
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * heads + 2 * kv_heads + 3 * spec.intermediate_size)
    assert parity(name) == spec.num_layers * layer // (num_full * 2 * heads)


def test_experts_count_as_often_as_a_token_has_them(parity: Any, checkpoints: Any) -> None:
    spec = load_spec(checkpoints("mixtral").folder)
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    assert isinstance(spec, MoeSpec)
    shape = spec.expert_shape
    router = spec.hidden_size * shape.num_experts
    experts = shape.experts_per_row * 3 * spec.hidden_size * shape.intermediate_size
    layer = spec.hidden_size * (2 * heads + 2 * kv_heads) + router + experts
    assert parity("mixtral") == layer // (2 * heads)
    assert shape.experts_per_row < shape.num_experts
