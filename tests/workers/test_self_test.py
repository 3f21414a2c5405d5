"""The start-up self-test passes with the kernels, and fails closed with a product that depends on its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sempre.ipc.errors import InvarianceError
from sempre.workers.models.numerics import CONTROL, INVARIANT, LinearKernel
from sempre.workers.models.spec import load_spec
from sempre.workers.self_test import compare_rows, self_test
from sempre.workers.weights import load_weights


def run(folder: Path, product: LinearKernel, dtype: str = "auto") -> dict[str, int]:
    spec = load_spec(folder)
    weights = load_weights(spec, folder, product, dtype=dtype, load_format="auto", seed=0)
    return self_test(spec, weights, product, block_size=16, max_tokens=256)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "qwen2-upper-window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_pass(family: str, dtype: str, checkpoints: Any) -> None:
    passed = run(checkpoints(family).folder, INVARIANT, dtype)
    assert passed["linear"] > 50
    assert passed["attention"] == (2 if family == "qwen2-upper-window" else 1)


def test_ordinary_product_is_refused(checkpoints: Any) -> None:
    with pytest.raises(
        InvarianceError, match=r"linear qkv \[N=128, K=64, float32\]: M=\d+: .* elements different"
    ) as caught:
        run(checkpoints("llama").folder, CONTROL)
    assert caught.value.operation.startswith("linear qkv")


def test_a_single_wrong_bit_is_found() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def apply(rows: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(rows)
        if len(rows) == 7:
            out.view(torch.int32)[3, 2] ^= 1

    compare_rows("copy", x, 4, apply, (2, 3, 8))
    with pytest.raises(InvarianceError, match=r"copy: M=7: .* found 1 of 28 elements different"):
        compare_rows("copy", x, 4, apply, (2, 7))


def test_nothing_is_drawn_from_the_global_generator(checkpoints: Any) -> None:
    before = torch.get_rng_state()
    run(checkpoints("llama").folder, INVARIANT)
    assert torch.equal(before, torch.get_rng_state())
