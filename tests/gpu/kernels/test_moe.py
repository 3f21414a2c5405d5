"""A mixture of experts on a GPU: the bits of the ordinary matmuls, whatever else is in the batch, also in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from moe_cases import ODD, Mixture, check_factors, check_route, check_scores, check_shared, check_sort

from sempre.kernels.activation import Activation
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.moe import ExpertShape

pytestmark = pytest.mark.gpu

SHAPES = {
    "odd": ODD,
    "30B-A3B": ExpertShape(128, 8, 2048, 768),
    "all of few": ExpertShape(4, 4, 256, 336),
    "one": ExpertShape(1, 1, 128, 64),
}
CASES = [
    *((name, torch.bfloat16, None) for name in SHAPES),
    ("odd", torch.float16, None),
    ("odd", torch.float32, None),
    *((name, torch.bfloat16, scheme) for name in ("30B-A3B", "all of few") for scheme in Fp8Scheme),
]
ROWS = 4096


@pytest.fixture(autouse=True, scope="module")
def _configured() -> Iterator[None]:
    if torch.cuda.is_available():
        from sempre.kernels.linear.gpu import configure

        configure()
    yield
    mixture.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def mixture(name: str, dtype: torch.dtype, scheme: Fp8Scheme | None, rows: int = ROWS) -> Mixture:
    return Mixture(SHAPES[name], dtype, "cuda", rows, scheme)


def test_route() -> None:
    check_route("cuda")


def test_sigmoid_scores() -> None:
    check_scores("cuda")


def test_factors_of_weights() -> None:
    check_factors("cuda")


def test_shared_expert() -> None:
    check_shared("cuda")


def test_sort() -> None:
    check_sort("cuda", ((1, 5, 3, 16), (7, 5, 3, 16), (16, 128, 8, 8), (40, 128, 8, 16), (100, 6, 6, 64),
                        (33, 300, 2, 8), (3000, 128, 8, 128), (500, 2000, 10, 16)))  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "scheme"), CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 129, 600, ROWS])
def test_bits_are_those_of_the_ordinary_matmuls(
    name: str, dtype: torch.dtype, scheme: Fp8Scheme | None, rows: int
) -> None:
    case = mixture(name, dtype, scheme)
    assert torch.equal(case.run(0, rows), case.one_by_one()[:rows])


@pytest.mark.parametrize(("name", "dtype", "scheme"), CASES, ids=str)
def test_rows_do_not_depend_on_their_number_or_place(name: str, dtype: torch.dtype, scheme: Fp8Scheme | None) -> None:
    case = mixture(name, dtype, scheme)
    alone = torch.cat([case.run(row, row + 1) for row in range(70)])
    for first, end in ((0, 2), (3, 8), (0, 17), (11, 70), (60, 200), (5, 1000), (0, ROWS)):
        found = case.run(first, end)[: 70 - first]
        assert torch.equal(found, alone[first : first + len(found)]), f"rows {first} to {end}"


@pytest.mark.parametrize(("dtype", "scheme"), [(torch.bfloat16, None), (torch.float32, None),
                                              (torch.bfloat16, Fp8Scheme.WEIGHTS)], ids=str)  # fmt: skip
def test_biases_and_clamped_activations(dtype: torch.dtype, scheme: Fp8Scheme | None) -> None:
    """Bits of the ordinary matmuls, and of rows alone; other values than without."""
    shape = ExpertShape(32, 4, 576, 336)
    case = Mixture(shape, dtype, "cuda", 600, scheme, Activation.CLAMPED)
    whole = case.one_by_one()
    for rows in (1, 40, 600):
        assert torch.equal(case.run(0, rows), whole[:rows])
    assert torch.equal(torch.cat([case.run(row, row + 1) for row in range(20)]), whole[:20])
    assert not torch.equal(Mixture(shape, dtype, "cuda", 600, scheme).one_by_one(), whole)


def test_accuracy_against_float64() -> None:
    case = mixture("odd", torch.float32, None)
    probabilities = case.logits.double().softmax(-1)
    best = probabilities.topk(ODD.experts_per_row)
    weights = best.values / best.values.sum(-1, keepdim=True)
    x = case.x.double()
    expected = torch.zeros_like(x)
    for rank in range(ODD.experts_per_row):
        for expert in range(ODD.num_experts):
            rows = best.indices[:, rank] == expert
            gate, up = (x[rows] @ case.gate_up.weight[expert].double().T).chunk(2, dim=-1)
            part = (torch.nn.functional.silu(gate) * up) @ case.down.weight[expert].double().T
            expected[rows] += weights[rows, rank, None] * part
    assert (case.run(0, ROWS) - expected).norm() / expected.norm() < 1e-6


def test_an_expert_that_nobody_chooses_is_not_read() -> None:
    case = Mixture(ODD, torch.bfloat16, "cuda", 50)
    expected = case.run(0, 50).clone()
    case.gate_up.weight[-1] = float("nan")
    case.down.weight[-1] = float("nan")
    assert torch.equal(case.run(0, 50), expected)
    assert torch.isfinite(expected).all()


def test_a_captured_graph_serves_other_choices() -> None:
    from sempre.kernels.moe import gpu

    case = mixture("30B-A3B", torch.bfloat16, None)
    for rows in (1, 16, 64):
        x, logits = case.x[:rows].clone(), case.logits[:rows].clone()
        out = torch.empty_like(x)

        def run(x: torch.Tensor = x, logits: torch.Tensor = logits, out: torch.Tensor = out) -> None:
            gpu.sparse_mlp(x, logits, case.experts, case.scratch, out, renormalize=True)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for first in (100, 900):
            x.copy_(case.x[first : first + rows])
            logits.copy_(case.logits[first : first + rows])
            graph.replay()
            assert torch.equal(out, case.run(first, first + rows))


def test_control_another_order_of_experts_gives_other_bits() -> None:
    """The comparison is able to fail: parts added from the last rank to the first."""
    from sempre.kernels.moe import gpu

    case = mixture("30B-A3B", torch.bfloat16, None)
    expected = case.run(0, 64)
    parts = case.scratch.parts[: 64 * 8].view(64, 8, -1)
    weights = case.scratch.weights[:64]
    assert torch.equal(gpu.combine(parts, weights, torch.empty_like(expected)), expected)
    backwards = gpu.combine(parts.flip(1).contiguous(), weights.flip(1).contiguous(), torch.empty_like(expected))
    assert not torch.equal(backwards, expected)
