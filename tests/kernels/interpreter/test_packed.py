"""Packed weights: what they stand for is what their codes say, and tiles multiply them as any matrix is multiplied."""

from __future__ import annotations

import pytest
import torch
from packed_cases import CASES, PackedCase, make_codes

from sempre.kernels.packed import can_pack, pack_codes, widen

ROWS = 5


@pytest.fixture(autouse=True)
def _gpu_module() -> None:
    pytest.importorskip("triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_packed_weight_stands_for_the_values_of_its_codes(case: PackedCase) -> None:
    codes = make_codes(case)
    dtype = torch.bfloat16 if case.is_float else torch.float16
    found = widen(pack_codes([codes], None, dtype))
    assert torch.equal(found, codes.values().to(dtype))
    # the control: with another number anywhere, they are not equal
    codes.codes[-1, -1] ^= 1
    assert not torch.equal(widen(pack_codes([codes], None, dtype)), found)


def test_matrices_are_packed_one_after_the_other() -> None:
    first, second = make_codes(CASES[0]), make_codes(CASES[0], seed=1)
    both = pack_codes([first, second], None, torch.float16)
    assert torch.equal(widen(both), torch.cat([first.values(), second.values()]))


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_float], ids=str)
def test_a_tile_multiplies_what_the_weight_stands_for(case: PackedCase) -> None:
    from sempre.kernels.linear import gpu as dense
    from sempre.kernels.linear.gpu_table import Tile
    from sempre.kernels.packed import gpu
    from sempre.kernels.packed.gpu_table import PackedTile

    generator = torch.Generator().manual_seed(3)
    codes = make_codes(case)
    bias = torch.randn(codes.out_features, generator=generator).to(torch.float16)
    w = pack_codes([codes], bias, torch.float16)
    x = torch.randn(ROWS, codes.in_features, generator=generator).to(torch.float16)
    block_k = max(64, w.scheme.unit)
    out = torch.full((ROWS, codes.out_features), float("nan"))
    found = gpu.run_tile(x, w, out, PackedTile(16, 32, block_k, 4, 2))
    exact = x.double() @ codes.values().to(torch.float16).double().t() + bias.double()
    assert torch.allclose(found.double(), exact, atol=2e-3, rtol=1e-5)
    # widened beforehand, the tile of the other linear layers; the interpreter's library adds in an order of its own
    plain = dense.run_tile(x, gpu.dense_weight(w), torch.empty_like(out), Tile(16, 32, block_k, 4, 2))
    assert torch.allclose(found, plain, atol=1e-4, rtol=1e-5)


def test_what_kernels_do_not_take_is_refused() -> None:
    codes = make_codes(CASES[0])
    assert not can_pack(codes.form, 24, codes.in_features, torch.float16, torch.float16)
    assert not can_pack(codes.form, codes.out_features, 96, torch.float16, torch.float16)
    assert not can_pack(codes.form, codes.out_features, codes.in_features, torch.float32, torch.float16)
    with pytest.raises(ValueError, match="no kernel"):
        pack_codes([codes], None, torch.float32)
