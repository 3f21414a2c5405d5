"""GPU matmuls: accuracy, equal bits for every number of rows and every kernel choice, and a control that differs."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.activation import Activation
from sempre.kernels.linear import GpuLinearWeight, gated_linear, linear, pack_linear

pytestmark = pytest.mark.gpu

# (K, N) of Qwen3-8B and Qwen3-0.6B, and odd ones
REAL = [(4096, 6144), (4096, 4096), (12288, 4096), (1024, 4096), (2048, 1024), (3072, 1024)]
ODD = [(576, 960), (1536, 576), (96, 33), (64, 1), (4104, 1000)]
ROWS = [1, 2, 3, 5, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 511, 512,
        777, 1024, 2000, 4095, 4096]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _configured() -> None:
    if torch.cuda.is_available():
        from sempre.kernels.linear.gpu import configure

        configure()


def _case(
    depth: int, columns: int, rows: int, dtype: torch.dtype, bias: bool = False
) -> tuple[torch.Tensor, GpuLinearWeight]:
    generator = torch.Generator("cuda").manual_seed(depth * 7 + columns)
    x = torch.randn(rows, depth, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(columns, depth, generator=generator, device="cuda") * depth**-0.5).to(dtype)
    b = torch.randn(columns, generator=generator, device="cuda").to(dtype) if bias else None
    packed = pack_linear(weight, b)
    assert isinstance(packed, GpuLinearWeight)
    return x, packed


def _run(x: torch.Tensor, w: GpuLinearWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], w.out_features), float("nan"), device="cuda", dtype=out_dtype or x.dtype)
    return linear(x, w, out)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("depth", "columns"), [*REAL[:2], *ODD])
def test_accuracy_against_float64(depth: int, columns: int, dtype: torch.dtype, bias: bool) -> None:
    for rows in (1, 33, 300):
        x, w = _case(depth, columns, rows, dtype, bias)
        expected = reference.linear(x, w.weight, w.bias)
        # the tensor core truncates each step of 16 products, so the error grows with their number
        assert (_run(x, w, torch.float32) - expected).norm() / expected.norm() < 1e-6 + depth / 16 * 2**-24
        rounding = {torch.float32: 3e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
        assert (_run(x, w) - expected).norm() / expected.norm() < rounding


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("depth", "columns"), [*REAL, *ODD])
def test_rows_do_not_depend_on_their_number_or_place(
    depth: int, columns: int, out_dtype: torch.dtype, bias: bool
) -> None:
    x, w = _case(depth, columns, 4096, torch.bfloat16, bias)
    alone = torch.cat([_run(x[i : i + 1], w, out_dtype) for i in range(512)])
    for rows in ROWS:
        start = min(7, 4096 - rows)
        found = _run(x[start : start + rows], w, out_dtype)
        count = min(rows, 512 - start)
        assert torch.equal(found[:count], alone[start : start + count]), f"{rows} rows"
        if rows > 512:
            last = _run(x[start + rows - 1 : start + rows], w, out_dtype)
            assert torch.equal(found[-1:], last), f"the last of {rows} rows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(1024, 4096), (576, 960)])
def test_other_dtypes_keep_a_rows_bits(depth: int, columns: int, dtype: torch.dtype) -> None:
    x, w = _case(depth, columns, 300, dtype)
    alone = torch.cat([_run(x[i : i + 1], w) for i in range(300)])
    for rows in (2, 16, 17, 64, 129, 300):
        assert torch.equal(_run(x[:rows], w), alone[:rows])


@pytest.mark.parametrize(("depth", "columns"), REAL)
def test_every_choice_of_the_table_agrees(depth: int, columns: int) -> None:
    from sempre.kernels.linear.gpu_check import disagreeing, disagreeing_fused

    _, w = _case(depth, columns, 1, torch.bfloat16)
    for activation in Activation:
        assert disagreeing_fused(w, activation, max_rows=4096) == {}
    assert disagreeing(w, torch.bfloat16, max_rows=4096) == {}
    assert disagreeing(w, torch.bfloat16, max_rows=1024, out_dtype=torch.float32) == {}


@pytest.mark.parametrize("activation", list(Activation), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("depth", "width"), [(4096, 12288), (1024, 3072), (576, 1536), (96, 40)])
def test_fused_activation_has_the_bits_of_two_steps(
    depth: int, width: int, dtype: torch.dtype, activation: Activation
) -> None:
    for rows in (1, 8, 16, 17, 40, 64, 100, 128, 300):
        x, w = _case(depth, 2 * width, rows, dtype)
        gate_up = torch.full((rows, 2 * width), float("nan"), device="cuda", dtype=dtype)
        out = torch.full((rows, width), float("nan"), device="cuda", dtype=dtype)
        expected = activation.and_mul(_run(x, w), torch.empty_like(out))
        assert torch.equal(gated_linear(x, w, gate_up, out, activation), expected), f"{rows} rows"


def test_default_library_settings_split_the_sum() -> None:
    """The control: with the library's defaults the same test fails."""
    from sempre.kernels.linear.gpu import configure

    torch.backends.cuda.preferred_blas_library("default")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    try:
        differing = []
        for depth, columns in REAL:
            x, w = _case(depth, columns, 512, torch.bfloat16)
            alone = torch.mm(x[:1], w.weight.t())
            differing += [
                rows for rows in ROWS if rows <= 512 and not torch.equal(torch.mm(x[:rows], w.weight.t())[:1], alone)
            ]
        assert differing
    finally:
        configure()


def test_wrong_shapes_and_dtypes_are_named() -> None:
    x, w = _case(64, 32, 3, torch.bfloat16)
    with pytest.raises(ValueError, match="do not fit a weight of 32 x 64"):
        linear(x[:, :32].contiguous(), w, torch.empty(3, 32, device="cuda"))
    with pytest.raises(TypeError, match=r"x is torch\.float32, the weight torch\.bfloat16"):
        linear(x.float(), w, torch.empty(3, 32, device="cuda"))
