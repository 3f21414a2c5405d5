"""A mixture of experts as a layer: rows among others, experts that nobody chooses, what its config may say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sempre.ipc.errors import ModelError
from sempre.kernels.linear import GpuLinearWeight
from sempre.kernels.moe import ExpertShape, route, stack_like
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.linear_kernel import INVARIANT, LinearWeight
from sempre.workers.layers.module import Build, Scratch, allocate
from sempre.workers.layers.moe import SparseMLP
from sempre.workers.models.registry import parse_spec
from sempre.workers.quantization.plain import NotQuantized

HIDDEN, INNER, EXPERTS, CHOSEN = 32, 48, 5, 3


@pytest.fixture
def layer() -> SparseMLP:
    build = Build(INVARIANT, NotQuantized())
    made = SparseMLP(build, ExpertShape(EXPERTS, CHOSEN, HIDDEN, INNER), renormalize=True)
    generator = torch.Generator().manual_seed(4)

    def weight(linear: Linear) -> LinearWeight:
        values = torch.randn(linear.out_features, linear.in_features, generator=generator) * 0.3
        return INVARIANT.pack(values, None)

    made.gate.weight = weight(made.gate)
    for expert in range(EXPERTS):
        for linear in (made.experts.gate_up_proj, made.experts.down_proj):
            linear.put(expert, weight(linear))
    allocate(made, Scratch(64, 64, torch.float32, torch.device("cpu")))
    return made


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(5))


def test_a_row_alone_has_its_bits(layer: SparseMLP) -> None:
    x = rows(40)
    together = layer(x).clone()
    for row in range(40):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    backwards = layer(x.flip(0).contiguous()).clone()
    assert torch.equal(backwards.flip(0), together)
    assert not torch.equal(backwards, together)


def test_an_expert_that_nobody_chooses_is_not_computed(layer: SparseMLP) -> None:
    x = rows(1)
    expected = layer(x).clone()
    chosen = route(layer.gate.into(x, torch.empty(1, EXPERTS)), CHOSEN, renormalize=True)[0][0].tolist()
    for expert in set(range(EXPERTS)) - set(chosen):
        layer.experts.down_proj.weights[expert] = INVARIANT.pack(torch.full((HIDDEN, INNER), float("nan")), None)
    assert torch.equal(layer(x), expected)


def test_no_row_gives_no_row(layer: SparseMLP) -> None:
    assert layer(rows(0)).shape == (0, HIDDEN)


def test_more_experts_than_a_gpu_takes_are_refused() -> None:
    pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")
    made = SparseMLP(Build(INVARIANT, NotQuantized()), ExpertShape(4096, 17, HIDDEN, INNER), renormalize=True)
    made.experts.down_proj.stacked = stack_like(GpuLinearWeight(torch.zeros(1, 1), None), 1)
    with pytest.raises(ModelError, match="num_experts_per_tok: expected at most 16 of 4096 experts a row on a GPU"):
        made.allocate(Scratch(64, 64, torch.float32, torch.device("cpu")))


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "sparse", "kinds"),
    [
        ({}, (0, 1, 2, 3), (1, (0,))),
        ({"decoder_sparse_step": 2}, (1, 3), (2, (1,))),
        ({"mlp_only_layers": [2, 3]}, (0, 1), (2, (0,))),
        ({"mlp_only_layers": [0, 1, 2, 3]}, (), (1, ())),
    ],
)
def test_which_layers_have_experts(
    changes: dict[str, Any], sparse: tuple[int, ...], kinds: tuple[int, tuple[int, ...]]
) -> None:
    """In the model, and where it has one layer of each kind."""
    spec: Any = parse_spec({**CONFIG, **changes}, {})
    assert spec.sparse_layers == sparse
    small = spec.one_layer_per_kind()
    assert (small.num_layers, small.sparse_layers) == kinds
    assert len(small.windows) == small.num_layers


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_experts_per_tok", 6, "at most num_experts=5, found 6"),
        ("num_experts", 0, "an integer of at least 1"),
        ("num_experts", 10**6, "an integer of at most 4096"),
        ("moe_intermediate_size", 24, "a multiple of 16"),
        ("norm_topk_prob", "yes", "true or false"),
        ("decoder_sparse_step", 0, "an integer of at least 1"),
        ("mlp_only_layers", ["0"], "a list of layers"),
        ("use_sliding_window", True, "false for this architecture"),
        ("hidden_act", "gelu", "'silu'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(field: str, value: object, expected: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {field}: expected {expected}"):
        parse_spec({**CONFIG, field: value}, {})
