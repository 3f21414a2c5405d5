"""The GPU's self-test: what counts as equal, what is named, and the matmuls' part on Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sempre.ipc.errors import InvarianceError

triton = pytest.importorskip("triton")

from sempre.kernels.linear import gpu_check  # noqa: E402
from sempre.kernels.linear.gpu_table import choose_fused  # noqa: E402
from sempre.kernels.linear.weights import GpuLinearWeight  # noqa: E402
from sempre.kernels.lora import LoraShape, make_slots  # noqa: E402
from sempre.workers.adapters.peft import adaptable_linears  # noqa: E402
from sempre.workers.gpu.self_test.linears import check_linears  # noqa: E402
from sempre.workers.layers.linear_kernel import INVARIANT  # noqa: E402
from sempre.workers.layers.module import Build  # noqa: E402
from sempre.workers.models.base import CausalLM  # noqa: E402
from sempre.workers.models.registry import build_model, parse_spec  # noqa: E402
from sempre.workers.quantization.plain import NotQuantized  # noqa: E402
from sempre.workers.self_test import compare, require_equal  # noqa: E402

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


def _model() -> CausalLM:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    model = build_model(Build(INVARIANT, NotQuantized()), parse_spec(config, {}))
    generator = torch.Generator().manual_seed(1)
    for _, linear in model.linears():
        shape = (linear.out_features, linear.in_features)
        linear.weight = GpuLinearWeight(torch.randn(shape, generator=generator).to(torch.float16), None)
    return model


def _weight(model: CausalLM, name: str) -> GpuLinearWeight:
    weight = next(linear.weight for path, linear in model.linears() if path.endswith(name))
    assert isinstance(weight, GpuLinearWeight)
    return weight


def test_matmuls_that_agree_are_all_kept() -> None:
    model = _model()
    tested = check_linears(model, torch.float16, max_tokens=20, max_num_seqs=4)
    assert tested.excluded == {}
    assert require_equal(tested.reference) == {"linear": 25}
    operations = {comparison.operation.split()[1] for comparison in tested.reference}
    assert operations == {"qkv_proj", "o_proj", "down_proj", "gate_up_proj", "lm_head"}


def test_a_fused_matmul_that_disagrees_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_check.run_fused_tile

    def wrong(x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, *rest: Any) -> torch.Tensor:
        run(x, w, out, *rest)[0, 0] += 1.0
        return out

    monkeypatch.setattr(gpu_check, "run_fused_tile", wrong)
    model = _model()
    tested = check_linears(model, torch.float16, max_tokens=20, max_num_seqs=4)
    shape = f"N={2 * INNER},K={HIDDEN}"
    assert [name.split()[0] for name in tested.excluded[shape]] == ["fused"]
    gate_up = _weight(model, "gate_up_proj")
    assert choose_fused("any", 4, INNER, frozenset()) is not None
    assert choose_fused("any", 4, INNER, gate_up.excluded) is None
    assert _weight(model, "down_proj").excluded == frozenset()


@pytest.mark.parametrize("with_adapters", [True, False])
def test_a_matmul_whose_float32_results_disagree_is_left_out_beside_adapters(
    with_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are added to those."""
    run = gpu_check.run_choice

    def wrong(x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, *rest: Any) -> torch.Tensor:
        run(x, w, out, *rest)
        if out.dtype == torch.float32 and w.in_features == INNER:
            out[0, 0] += 1.0
        return out

    monkeypatch.setattr(gpu_check, "run_choice", wrong)
    model = _model()
    if with_adapters:
        for _, linear in adaptable_linears(model):
            shape = LoraShape(linear.in_features, tuple(linear.parts.values()), 1, 16)
            linear.adapters = make_slots(shape, torch.float16, torch.device("cpu"))
    tested = check_linears(model, torch.float16, max_tokens=20, max_num_seqs=4)
    assert (f"N={HIDDEN},K={INNER}" in tested.excluded) == with_adapters
