"""Packed weights on a GPU: the bits of the widened matrix at every number of rows, whichever tile computes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_cases import PackedCase, make_codes

from sempre.kernels.linear import gpu as dense
from sempre.kernels.linear.gpu_table import REFERENCE
from sempre.kernels.packed import CodeForm, Codes, Numbers, PackedScheme, PackedWeight, pack_codes, packed_linear, widen
from sempre.kernels.packed import gpu as packed_gpu
from sempre.kernels.packed.gpu_check import disagreeing_packed
from sempre.kernels.packed.gpu_table import TABLES, PackedTile, fits

pytestmark = pytest.mark.gpu

HALF, BRAIN = torch.float16, torch.bfloat16
FORMS = {
    "int4-128-zeros": CodeForm(4, 128, has_zeros=True),
    "int4-32": CodeForm(4, 32),
    "int4-64-zeros": CodeForm(4, 64, has_zeros=True),
    "int4-channel": CodeForm(4, None),
    "int8-128-zeros": CodeForm(8, 128, has_zeros=True),
    "int8-32": CodeForm(8, 32),
    "int8-channel": CodeForm(8, None),
    "mxfp4": CodeForm(4, 32, numbers=Numbers.E2M1),
}
# (K, N) of Qwen3-8B, and odd ones
REAL = [(4096, 6144), (4096, 4096), (12288, 4096)]
ODD = [(576, 960), (192, 48), (64, 16), (4160, 1008)]
ROWS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 256, 257, 300, 1000]

# of every number of a word
HIGHEST = {PackedScheme.INT8: -0x7F7F7F80, PackedScheme.INT4: -0x77777778, PackedScheme.MXFP4: -0x77777778}


def _codes(form: CodeForm, depth: int, columns: int, scale: torch.dtype) -> Codes:
    codes = make_codes(PackedCase(columns, depth, form, scale))
    if form.numbers is not Numbers.E2M1:
        codes = replace(codes, scales=(codes.scales.float() * 8 * depth**-0.5).to(scale))
    zeros = None if codes.zeros is None else codes.zeros.cuda()
    return replace(codes, codes=codes.codes.cuda(), scales=codes.scales.cuda(), zeros=zeros)


def _dtypes(form: CodeForm) -> list[tuple[torch.dtype, torch.dtype]]:
    """Of scales, and of the matrix."""
    return [(BRAIN, BRAIN)] if form.numbers is Numbers.E2M1 else [(a, b) for a in (HALF, BRAIN) for b in (HALF, BRAIN)]


CASES = [(name, *pair) for name, form in FORMS.items() for pair in _dtypes(form)]


def _fits(form: CodeForm, depth: int) -> bool:
    return depth % form.group_of(depth) == 0


@pytest.mark.parametrize(("name", "scale", "dtype"), CASES, ids=str)
def test_a_packed_weight_stands_for_the_values_of_its_codes(name: str, scale: torch.dtype, dtype: torch.dtype) -> None:
    for depth, columns in [(4096, 512), *ODD]:
        if _fits(FORMS[name], depth):
            codes = _codes(FORMS[name], depth, columns, scale)
            assert torch.equal(widen(pack_codes([codes], None, dtype)), codes.values().to(dtype)), (depth, columns)


def test_every_number_with_every_exponent_of_mxfp4() -> None:
    """Also those below float32's and bfloat16's normal numbers, and the greatest."""
    codes = torch.stack([torch.arange(256, dtype=torch.uint8).roll(16 * i)[:128] for i in range(144)])
    exponents = (torch.arange(144, dtype=torch.int32)[:, None] + torch.arange(8, dtype=torch.int32)) % 129
    form = FORMS["mxfp4"]
    made = Codes(codes.cuda(), exponents.to(torch.uint8).cuda(), None, form)
    found, expected = widen(pack_codes([made], None, BRAIN)), made.values()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def _weight(name: str, depth: int, columns: int, pair: tuple[torch.dtype, torch.dtype], bias: bool) -> PackedWeight:
    own = torch.randn(columns, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) if bias else None
    return pack_codes([_codes(FORMS[name], depth, columns, pair[0])], own, pair[1])


@pytest.mark.parametrize(("name", "scale", "dtype"), CASES, ids=str)
def test_bits_are_those_of_the_widened_matrix_for_any_rows(name: str, scale: torch.dtype, dtype: torch.dtype) -> None:
    shapes = REAL if name in ("int4-128-zeros", "mxfp4") and scale is dtype else []
    for depth, columns in [*shapes, *ODD]:
        if not _fits(FORMS[name], depth):
            continue
        for bias in (False, True):
            w = _weight(name, depth, columns, (scale, dtype), bias)
            generator = torch.Generator("cuda").manual_seed(depth)
            x = torch.randn(max(ROWS), depth, generator=generator, device="cuda").to(dtype)
            out_dtype = torch.float32 if bias else dtype
            nan = torch.full((max(ROWS), columns), float("nan"), device="cuda", dtype=out_dtype)
            expected = dense.run_tile(x, packed_gpu.dense_weight(w), nan.clone(), REFERENCE)
            for rows in ROWS:
                found = packed_linear(x[:rows], w, nan[:rows].clone())
                assert torch.equal(found, expected[:rows]), (depth, columns, rows, bias)
            alone = packed_linear(x[5:6].contiguous(), w, nan[:1].clone())
            assert torch.equal(alone[0], expected[5])
            # the control: numbers of the first outputs have another highest bit; a lower one may be rounded away
            words = w.words.clone()
            words[0] ^= HIGHEST[w.scheme]
            assert not torch.equal(packed_linear(x[:8], replace(w, words=words), nan[:8].clone()), expected[:8])


@pytest.mark.parametrize("name", ["int4-128-zeros", "int8-128-zeros", "mxfp4"])
def test_the_self_test_excludes_no_tile_of_the_table(name: str) -> None:
    for depth, columns in REAL:
        w = _weight(name, depth, columns, (BRAIN, BRAIN), bias=False)
        for out_dtype in (BRAIN, torch.float32):
            assert disagreeing_packed(w, max_rows=1024, out_dtype=out_dtype) == {}


def test_the_self_test_reports_a_tile_that_adds_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of K beside the first."""
    w = _weight("int4-128-zeros", 4096, 4096, (BRAIN, BRAIN), bias=False)
    original = packed_gpu.run_tile

    def wrong(x: torch.Tensor, w: PackedWeight, out: torch.Tensor, tile: PackedTile) -> torch.Tensor:
        half = w.in_features // 2
        first = original(torch.cat([x[:, :half], torch.zeros_like(x[:, half:])], 1), w, torch.empty_like(out), tile)
        second = original(torch.cat([torch.zeros_like(x[:, :half]), x[:, half:]], 1), w, torch.empty_like(out), tile)
        return out.copy_(first + second)

    monkeypatch.setattr("sempre.kernels.packed.gpu_check.run_tile", wrong)
    assert disagreeing_packed(w, max_rows=64, out_dtype=torch.float32)


def test_tables_hold_tiles_that_fit_usual_groups() -> None:
    for (_, scheme), entries in TABLES.items():
        form = FORMS["mxfp4" if scheme.name == "MXFP4" else scheme.name.lower() + "-128-zeros"]
        w = pack_codes([_codes(form, 4096, 64, BRAIN)], None, BRAIN)
        assert all(fits(entry.choice, w) for entry in entries if isinstance(entry.choice, PackedTile))
