"""The invariant matmul: exact for invariance, against float64 for accuracy, and a control that must fail."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch
from matmul_order import product_in_order

from sempre.kernels.linear import control_linear, control_pack, linear, pack_linear
from sempre.kernels.threads import get_num_threads, set_num_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (576, 960), (1536, 576), (100, 33), (7, 5), (1, 1), (129, 320)]  # (K, N)
ROWS = [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 23, 24, 25, 31, 33, 64, 65, 128, 239, 240, 241, 255, 300]


def _product(x: torch.Tensor, packed: object) -> torch.Tensor:
    out = torch.full((x.shape[0], packed.out_features), float("nan"))
    return linear(x, packed, out)


def _case(depth: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(depth * 1000 + columns)
    x = torch.randn(300, depth, generator=generator)
    weight = (torch.randn(columns, depth, generator=generator) * depth**-0.5).to(dtype)
    return x, weight, torch.randn(columns, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_rows_do_not_depend_on_their_number_or_place(depth: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = _case(depth, columns, dtype)
    packed = pack_linear(weight, bias)
    alone = torch.cat([_product(x[i : i + 1], packed) for i in range(300)])
    for rows in ROWS:
        for start in {0, 1, (300 - rows) // 2, 300 - rows}:
            if start + rows <= 300:
                assert torch.equal(_product(x[start : start + rows], packed), alone[start : start + rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_accuracy_against_float64(depth: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = _case(depth, columns, dtype)
    expected = reference.linear(x, weight, bias)
    error = (_product(x, pack_linear(weight, bias)) - expected).norm() / expected.norm()
    assert error < 2.5e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_storage_gives_the_bits_of_its_widened_copy(dtype: torch.dtype) -> None:
    x, weight, bias = _case(576, 960, dtype)
    narrow, wide = pack_linear(weight, bias), pack_linear(weight.float(), bias)
    assert narrow.nbytes < 0.51 * wide.nbytes
    for rows in (1, 3, 12, 23, 24, 300):
        assert torch.equal(_product(x[:rows], narrow), _product(x[:rows], wide))


def test_result_does_not_depend_on_threads() -> None:
    x, weight, bias = _case(576, 960, torch.float32)
    packed = pack_linear(weight, bias)
    before = get_num_threads()
    results = []
    for threads in (1, 2):
        set_num_threads(threads)
        results.append(torch.cat([_product(x[:rows], packed) for rows in ROWS]))
    set_num_threads(before)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("depth", [63, 64, 65, 100, 128, 200])
def test_order_is_chains_of_fused_multiply_adds(depth: int) -> None:
    """The documented order, computed step by step with a fused operation that rounds once, gives the same bits."""
    x, weight, _ = _case(depth, 33, torch.float32)
    expected = torch.from_numpy(product_in_order(x.numpy(), weight.numpy()))
    assert torch.equal(_product(x, pack_linear(weight)), expected)


def test_the_error_hardly_grows_with_the_depth() -> None:
    """One chain over all of 4864 terms is off by 1.2e-6."""
    for depth in (64, 896, 4864):
        x, weight, _ = _case(depth, 64, torch.float32)
        expected = reference.linear(x, weight, None)
        assert (_product(x, pack_linear(weight)) - expected).norm() / expected.norm() < 2.5e-7


def test_nothing_is_written_past_a_row() -> None:
    x, weight, _ = _case(64, 33, torch.float32)
    buffer = torch.full((6, 33), 7.0)
    linear(x[:5], pack_linear(weight), buffer[:5])
    assert (buffer[5] == 7.0).all()
    assert not (buffer[:5] == 7.0).any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = pack_linear(torch.ones(3, 4))
    with pytest.raises(ValueError, match="do not fit a weight of 3 x 4"):
        linear(torch.ones(2, 5), packed, torch.ones(2, 3))


def test_unknown_storage_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        pack_linear(torch.ones(3, 4, dtype=torch.float64))


def test_control_the_ordinary_matmul_depends_on_the_number_of_rows() -> None:
    """The check above can fail: the library's own matmul changes a row's bits with the number of rows."""
    differing = 0
    for depth, columns in ((576, 960), (1536, 576), (576, 3072)):
        x, weight, _ = _case(depth, columns, torch.float32)
        packed = control_pack(weight)
        full = control_linear(x, packed, torch.empty(300, columns))
        for rows in (1, 2, 4):
            part = control_linear(x[:rows], packed, torch.empty(rows, columns))
            differing += int((part != full[:rows]).sum())
    assert differing > 0
