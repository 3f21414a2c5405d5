"""The start-up self-test passes with the kernels, and fails closed with a product that depends on its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sempre.ipc.errors import InvarianceError
from sempre.workers import self_test as self_test_module
from sempre.workers.models import decoder
from sempre.workers.models.numerics import CONTROL, INVARIANT, LinearKernel, Packed
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


def flip_a_bit(out: torch.Tensor) -> None:
    out.view(torch.int32)[-1, -1] ^= 1


@pytest.mark.parametrize("matrix", ["qkv", "o", "gate_up", "down", "lm_head"])
def test_each_matrix_of_the_model_is_tested(matrix: str, checkpoints: Any) -> None:
    folder = checkpoints("llama").folder
    spec = load_spec(folder)
    weights = load_weights(spec, folder, INVARIANT, dtype="auto", load_format="auto", seed=0)
    target = weights.lm_head if matrix == "lm_head" else getattr(weights.layers[0], matrix)

    def apply(x: torch.Tensor, packed: Packed, out: torch.Tensor) -> torch.Tensor:
        INVARIANT.apply(x, packed, out)
        if packed is target and len(x) > 1:
            flip_a_bit(out)
        return out

    with pytest.raises(InvarianceError, match=rf"linear {matrix} \[.*found 1 of"):
        self_test(spec, weights, INVARIANT._replace(apply=apply), block_size=16, max_tokens=256)


@pytest.mark.parametrize(
    ("kernel", "operation"),
    [
        ("rms_norm", r"rms_norm \[H=64\]"),
        ("add_rms_norm", r"add_rms_norm \[H=64\]"),
        ("silu_and_mul", r"silu_and_mul \[I="),
    ],
)
def test_each_kernel_of_rows_is_tested(
    kernel: str, operation: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose last row depends on whether there are others before it."""
    right = getattr(self_test_module, kernel)

    def wrong(x: torch.Tensor, *rest: Any) -> None:
        right(x, *rest)
        if len(x) > 1:
            flip_a_bit(rest[-1])

    monkeypatch.setattr(self_test_module, kernel, wrong)
    with pytest.raises(InvarianceError, match=operation):
        run(checkpoints("llama").folder, INVARIANT)


def test_attention_is_tested(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_test_module.paged_attention

    def wrong(qkv: torch.Tensor, cache: Any, tables: torch.Tensor, *rest: Any, out: torch.Tensor, **shape: Any) -> None:
        right(qkv, cache, tables, *rest, out=out, **shape)
        if len(tables) > 1:
            flip_a_bit(out)

    monkeypatch.setattr(self_test_module, "paged_attention", wrong)
    with pytest.raises(InvarianceError, match=r"attention \[.*prompt cut at"):
        run(checkpoints("llama").folder, INVARIANT)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotation_and_the_norm_before_it_are_tested(
    family: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation that goes wrong in chunks; for a model that has norms of queries and keys, only where they are on."""
    right = decoder.rope_and_cache_write

    def wrong(qkv: torch.Tensor, *rest: Any, q_norm: torch.Tensor | None, **shape: Any) -> None:
        right(qkv, *rest, q_norm=q_norm, **shape)
        if 1 < len(qkv) < 100 and (q_norm is not None) is (family == "qwen3"):
            qkv[-1, 0] += 1.0

    monkeypatch.setattr(decoder, "rope_and_cache_write", wrong)
    with pytest.raises(InvarianceError, match=r"attention \["):
        run(checkpoints(family).folder, INVARIANT)


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
