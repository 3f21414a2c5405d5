"""The start-up self-test passes with the kernels, and fails closed with anything that depends on other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_names import NAMES
from worker_settings import worker_config

from sempre.ipc.errors import InvarianceError
from sempre.kernels.fp8 import FP8
from sempre.workers.layers import attention, embedding, norm
from sempre.workers.layers.linear_kernel import CONTROL, INVARIANT, LinearKernel, LinearWeight
from sempre.workers.loading import Loaded, load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.self_test import check_linears, check_model, compare, compare_rows, require_equal


def load(folder: Path, kernel: LinearKernel, dtype: str = "auto", **settings: Any) -> Loaded:
    return load_model(worker_config(folder, dtype=dtype, **settings), load_spec(folder), kernel)


def run(folder: Path, kernel: LinearKernel = INVARIANT, dtype: str = "auto", max_tokens: int = 256) -> dict[str, int]:
    """The tree alone."""
    model, facts = load(folder, kernel, dtype)
    return require_equal(check_model(model, facts, 16, max_tokens=max_tokens))


FAMILIES = [
    "llama",
    "llama-biases",
    "qwen3",
    "mistral-window",
    "qwen2-upper-window",
    "llama-multi-head-tied",
    "qwen3-moe",
    "gemma2",
    "qwen3-moe-odd",
    "mixtral-odd",
    "glm4",
    "glm4-moe",
    "qwen2-moe",
    "gpt-oss-odd",
    "gemma4",
    "gemma4-odd",
    "gemma4-moe",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_pass(family: str, dtype: str, checkpoints: Any) -> None:
    folder = checkpoints(family).folder
    assert run(folder, dtype=dtype) == {"model": 4}
    model, facts = load(folder, INVARIANT, dtype)
    assert require_equal(check_linears(model, facts.matrix_dtype, 256))["linear"] > 50


@pytest.mark.parametrize(
    "family", [name if name == "gemma4" else pytest.param(name, marks=pytest.mark.product) for name in NAMES]
)
def test_an_fp8_cache_passes(family: str, checkpoints: Any) -> None:
    """With every family's heads, windows, shared keys and values, and states."""
    folder = checkpoints(family).folder
    model, facts = load(folder, INVARIANT, kv_cache_dtype="fp8")
    assert facts.kv_dtype is FP8
    assert require_equal(check_model(model, facts, 16, max_tokens=256)) == {"model": 4}
    with pytest.raises(InvarianceError, match=r"model \[\w+, \w+\]: in chunks.* elements different"):
        require_equal(check_model(*load(folder, CONTROL, kv_cache_dtype="fp8"), 16, max_tokens=256))


@pytest.mark.parametrize("max_tokens", [1, 2, 17, 18, 40, 100])
def test_steps_of_any_size_pass(max_tokens: int, checkpoints: Any) -> None:
    assert run(checkpoints("qwen2-upper-window").folder, max_tokens=max_tokens) == {"model": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ordinary_matmul_is_refused(family: str, checkpoints: Any) -> None:
    folder = checkpoints(family).folder
    with pytest.raises(InvarianceError, match=r"model \[\w+, float32\]: in chunks.* elements different") as caught:
        run(folder, CONTROL)
    assert caught.value.operation.startswith("model")
    model, facts = load(folder, CONTROL)
    with pytest.raises(
        InvarianceError, match=r"linear qkv_proj \[N=\d+, K=64, float32\]: M=\d+: .* elements different"
    ):
        require_equal(check_linears(model, facts.matrix_dtype, 256))


def flip_a_bit(out: torch.Tensor) -> None:
    out.view(torch.int32)[-1, -1] ^= 1


@pytest.mark.parametrize("part", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"])
def test_each_matrix_of_the_model_is_tested(part: str, checkpoints: Any) -> None:
    """A matmul whose last row depends on whether there are others before it."""

    def flipped(x: torch.Tensor, weight: LinearWeight, out: torch.Tensor) -> torch.Tensor:
        INVARIANT.linear(x, weight, out)
        if weight is target and len(x) > 1:
            flip_a_bit(out)
        return out

    def gated(
        x: torch.Tensor, weight: LinearWeight, scratch: torch.Tensor, out: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        INVARIANT.gated_linear(x, weight, scratch, out, *rest)
        if weight is target and len(x) > 1:
            flip_a_bit(out)
        return out

    kernel = INVARIANT._replace(linear=flipped, gated_linear=gated)
    model, facts = load(checkpoints("llama").folder, kernel)
    target = next(linear.weight for path, linear in model.linears() if path.endswith(part))
    with pytest.raises(InvarianceError, match=rf"linear {part} \[.*found 1 of"):
        require_equal(check_linears(model, facts.matrix_dtype, 256))
    with pytest.raises(InvarianceError, match=r"model \["):
        require_equal(check_model(model, facts, 16, max_tokens=256))


@pytest.mark.parametrize(
    ("module", "kernel"),
    [(norm, "rms_norm"), (norm, "add_rms_norm"), (embedding, "embed"), (attention, "paged_attention")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kernel_of_rows_is_tested(
    module: Any, kernel: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose last row depends on whether there are many others before it."""
    right = getattr(module, kernel)

    def wrong(x: torch.Tensor, *rest: Any, **others: Any) -> torch.Tensor:
        out: torch.Tensor = right(x, *rest, **others)
        if 1 < len(x) < 100:
            flip_a_bit(out)
        return out

    monkeypatch.setattr(module, kernel, wrong)
    with pytest.raises(InvarianceError, match=r"model \["):
        run(checkpoints("llama").folder)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_and_the_norm_before_it_are_tested(family: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rope that goes wrong in chunks; for a model that has norms of queries and keys, only where they are on."""
    right = attention.rope_and_cache_write

    def wrong(qkv: torch.Tensor, *rest: Any) -> None:
        right(qkv, *rest)
        if 1 < len(qkv) < 100 and (rest[-1] is not None) is (family == "qwen3"):
            qkv[-1, 0] += 1.0

    monkeypatch.setattr(attention, "rope_and_cache_write", wrong)
    with pytest.raises(InvarianceError, match=r"model \["):
        run(checkpoints(family).folder)


def test_each_kind_of_window_is_tested(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of windows alone is found in the block that has one, which is not the first."""
    right = attention.paged_attention

    def wrong(qkv: torch.Tensor, cache: Any, batch: Any, heads: Any, scores: Any, *rest: Any) -> torch.Tensor:
        out = right(qkv, cache, batch, heads, scores, *rest)
        if scores.window is not None and len(qkv) < 100:
            flip_a_bit(out)
        return out

    monkeypatch.setattr(attention, "paged_attention", wrong)
    assert run(checkpoints("llama").folder) == {"model": 4}
    with pytest.raises(InvarianceError, match=r"model \["):
        run(checkpoints("qwen2-upper-window").folder)


def test_the_model_can_compute_steps_before_and_after(checkpoints: Any, serve: Any, prompt: Any) -> None:
    """A self-test of a serving worker leaves its buffers alone."""
    from sempre.ipc.messages import CallMethod, SamplingSpec

    worker = serve(checkpoints("llama").folder)
    request = prompt("a", list(range(3, 60)), SamplingSpec(max_tokens=5, temperature=0.7, logprobs=3))
    expected = worker.run(request)
    reply = worker.worker.call(CallMethod(call_id=1, method="self_test"))
    assert reply.error is None
    assert reply.result["model"] == 4
    assert worker.run(request) == expected


def test_a_single_wrong_bit_is_found() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    wrong = x.clone()
    wrong.view(torch.int32)[3, 2] ^= 1
    for how in (compare, compare_rows):
        assert require_equal([how("copy", "M=8", x, x.clone())]) == {"copy": 1}
        with pytest.raises(InvarianceError, match=r"copy: M=8: .* found 1 of 32 elements different"):
            require_equal([how("copy", "M=8", x, wrong)])


def test_nan_of_the_weights_is_no_difference_and_a_new_one_is() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert require_equal([compare_rows("model", "again", x, x.clone())]) == {"model": 1}
    for other in ([1.0, 2.0, float("inf")], [float("nan"), float("nan"), float("inf")]):
        with pytest.raises(InvarianceError, match="found 1 of 3"):
            require_equal([compare_rows("model", "again", x, torch.tensor(other))])


def test_nothing_is_drawn_from_the_global_generator(checkpoints: Any) -> None:
    before = torch.get_rng_state()
    model, facts = load(checkpoints("llama").folder, INVARIANT)
    require_equal([*check_linears(model, facts.matrix_dtype, 256), *check_model(model, facts, 16, max_tokens=256)])
    assert torch.equal(before, torch.get_rng_state())
