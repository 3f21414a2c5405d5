"""The GPU's self-test: what counts as equal, what is named, and the products' part on Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sempre.ipc.errors import InvarianceError

triton = pytest.importorskip("triton")

from sempre.kernels.linear import gpu_check  # noqa: E402
from sempre.kernels.linear.gpu_table import Tile, choose_fused  # noqa: E402
from sempre.kernels.linear.weights import GpuLinear  # noqa: E402
from sempre.workers.gpu.self_test import compare, require_equal  # noqa: E402
from sempre.workers.gpu.self_test.products import check_products  # noqa: E402
from sempre.workers.models.decoder import DecoderWeights, LayerWeights  # noqa: E402

HIDDEN, INNER, VOCABULARY = 32, 48, 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_bits_pass(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    passed = require_equal([compare("norm [H=7]", "again", x, x.clone()), compare("norm [H=7]", "again", x, x)])
    assert passed == {"norm": 2}


@pytest.mark.parametrize(("expected", "found"), [(1.0, 1.0000001), (0.0, -0.0), (float("nan"), float("nan"))])
def test_other_bits_and_nan_are_named(expected: float, found: float) -> None:
    comparison = compare("norm [H=3]", "row 2 alone", torch.full((3,), expected), torch.tensor([expected, found, 1.0]))
    with pytest.raises(InvarianceError, match=r"norm \[H=3\]: row 2 alone: .* [123] of 3 elements") as caught:
        require_equal([comparison])
    assert caught.value.operation == "norm [H=3]"


def _weights() -> DecoderWeights:
    generator = torch.Generator().manual_seed(1)

    def linear(columns: int, depth: int) -> GpuLinear:
        return GpuLinear(torch.randn(columns, depth, generator=generator).to(torch.float16), None)

    ones = torch.ones(HIDDEN, dtype=torch.float16)
    layer = LayerWeights(
        input_norm=ones,
        qkv=linear(3 * HIDDEN, HIDDEN),
        q_norm=None,
        k_norm=None,
        o=linear(HIDDEN, HIDDEN),
        post_attention_norm=ones,
        gate_up=linear(2 * INNER, HIDDEN),
        down=linear(HIDDEN, INNER),
    )
    return DecoderWeights(
        embedding=torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float16),
        layers=(layer,),
        final_norm=ones,
        lm_head=linear(VOCABULARY, HIDDEN),
        dtype=torch.float16,
        storage=torch.float16,
        digest="",
        quantization=None,
    )


def test_products_that_agree_are_all_kept() -> None:
    tested = check_products(_weights(), max_tokens=20, max_num_seqs=4)
    assert tested.excluded == {}
    assert require_equal(tested.reference) == {"linear": 25}
    operations = {comparison.operation.split()[1] for comparison in tested.reference}
    assert operations == {"qkv", "o", "down", "gate_up", "lm_head"}


def test_a_fused_product_that_disagrees_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_check.run_fused_tile

    def wrong(x: torch.Tensor, w: GpuLinear, out: torch.Tensor, tile: Tile) -> torch.Tensor:
        run(x, w, out, tile)[0, 0] += 1.0
        return out

    monkeypatch.setattr(gpu_check, "run_fused_tile", wrong)
    tested = check_products(_weights(), max_tokens=20, max_num_seqs=4)
    shape = f"N={2 * INNER},K={HIDDEN}"
    assert [name.split()[0] for name in tested.excluded[shape]] == ["fused"]
    gate_up = tested.weights.layers[0].gate_up
    assert isinstance(gate_up, GpuLinear)
    assert choose_fused("any", 4, INNER, frozenset()) is not None
    assert choose_fused("any", 4, INNER, gate_up.excluded) is None
    down = tested.weights.layers[0].down
    assert isinstance(down, GpuLinear)
    assert down.excluded == frozenset()
