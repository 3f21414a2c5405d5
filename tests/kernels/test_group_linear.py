"""Rows with weights of their own: the bits of `linear` with each row's, however rows and threads are divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.linear import (
    CpuLinearWeight,
    GroupRows,
    WeightGroup,
    group_linear,
    group_weights,
    linear,
    pack_bfloat16_linear,
    pack_fp8_linear,
    pack_linear,
)
from sempre.kernels.threads import get_num_threads, set_num_threads

Pack = Callable[[torch.Tensor, torch.Tensor | None], CpuLinearWeight]
# rows of each weight: none, one, several tiles, enough to widen a panel, and more than a block
COUNTS = (3, 0, 1, 24, 250, 0, 13)
X_ROWS, OUT_ROWS = 60, 300


def pack_fp8(scheme: Fp8Scheme) -> Pack:
    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> CpuLinearWeight:
        return pack_fp8_linear(*quantize_channels(weight), bias, scheme)

    return pack


PACKS: dict[str, Pack] = {
    "float32": pack_linear,
    "bfloat16": lambda weight, bias: pack_linear(weight.bfloat16(), bias),
    "rounded": lambda weight, bias: pack_bfloat16_linear(weight.bfloat16(), bias),
    "fp8 weights": pack_fp8(Fp8Scheme.WEIGHTS),
    "fp8": pack_fp8(Fp8Scheme.WEIGHTS_AND_ACTIVATIONS),
}


def make(pack: Pack, depth: int, columns: int, *, bias: bool) -> tuple[torch.Tensor, list[CpuLinearWeight]]:
    generator = torch.Generator().manual_seed(depth + columns)
    weights = [
        pack(
            torch.randn(columns, depth, generator=generator) * depth**-0.5,
            torch.randn(columns, generator=generator) if bias else None,
        )
        for _ in COUNTS
    ]
    return torch.randn(X_ROWS, depth, generator=generator), weights


def group(weights: Sequence[CpuLinearWeight]) -> WeightGroup:
    found = group_weights(weights)
    assert found is not None
    return found


def rows_of(counts: Sequence[int]) -> GroupRows:
    """Rows of x several times and in no order, and results in another."""
    drawn = np.random.default_rng(7)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(starts[-1])
    return GroupRows(starts, drawn.integers(0, X_ROWS, total), drawn.permutation(OUT_ROWS)[:total].astype(np.int64))


def row_by_row(x: torch.Tensor, weights: Sequence[CpuLinearWeight], rows: GroupRows) -> torch.Tensor:
    out = torch.full((OUT_ROWS, weights[0].out_features), float("nan"))
    for weight, start, end in zip(weights, rows.starts[:-1], rows.starts[1:], strict=True):
        for row, place in zip(rows.x_rows[start:end], rows.out_rows[start:end], strict=True):
            linear(x[row : row + 1], weight, out[place : place + 1])
    return out


def together(x: torch.Tensor, weights: Sequence[CpuLinearWeight], rows: GroupRows) -> torch.Tensor:
    out = torch.full((OUT_ROWS, weights[0].out_features), float("nan"))
    return group_linear(x, group(weights), rows, out)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN included: rows that nobody wrote."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize(("depth", "columns", "bias"), [(96, 33, True), (64, 320, False)])
def test_every_row_has_the_bits_of_its_own_weight(kind: str, depth: int, columns: int, bias: bool) -> None:
    x, weights = make(PACKS[kind], depth, columns, bias=bias)
    rows = rows_of(COUNTS)
    expected = row_by_row(x, weights, rows)
    before, found = get_num_threads(), []
    try:
        for threads in (1, 2):
            set_num_threads(threads)
            found.append(together(x, weights, rows))
    finally:
        set_num_threads(before)
    assert same(found[0], expected)
    assert same(found[1], expected)
    assert not same(together(x, weights[::-1], rows), expected), "the control: weights of other rows go unnoticed"


@pytest.mark.parametrize("counts", [(1, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 1), (0,) * 7])
def test_few_rows_or_none(counts: tuple[int, ...]) -> None:
    x, weights = make(PACKS["bfloat16"], 96, 33, bias=True)
    rows = rows_of(counts)
    assert same(together(x, weights, rows), row_by_row(x, weights, rows))


def test_weights_that_are_not_alike_are_no_group() -> None:
    _, weights = make(PACKS["float32"], 64, 64, bias=False)
    for other in (
        make(PACKS["float32"], 64, 96, bias=False)[1][0],
        make(PACKS["bfloat16"], 64, 64, bias=False)[1][0],
        pack_linear(torch.zeros(64, 64), leaves=2),
        object(),
    ):
        assert group_weights([*weights, other]) is None


def test_what_does_not_fit_is_refused() -> None:
    x, weights = make(PACKS["float32"], 64, 64, bias=False)
    for wrong in ({"x": x[:, :32].contiguous()}, {"out": torch.empty(OUT_ROWS, 32)}, {"rows": rows_of(COUNTS[1:])}):
        given = {"x": x, "group": group(weights), "rows": rows_of(COUNTS), "out": torch.empty(OUT_ROWS, 64)} | wrong
        with pytest.raises(ValueError, match=r"group_linear: x .* do not fit 7 weights of 64 x 64"):
            group_linear(**given)
