"""The matmul of a CPU whose inputs are bfloat16 on both sides: one chain over k, whatever computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_reference import fma

from sempre.kernels.jit import compiled
from sempre.kernels.linear import linear, pack_bfloat16_linear, pack_linear
from sempre.kernels.linear.cpu_pairs import ROUND_ROW, TILES, pair_tiles, pairs_of
from sempre.kernels.linear.cpu_tiles import PANEL, TILE_ROWS
from sempre.kernels.native import NativeGroup, call_native
from sempre.kernels.threads import get_num_threads, set_num_threads

SHAPES = [(64, 64), (576, 960), (1536, 576), (100, 33), (7, 5), (1, 1), (129, 320)]  # (K, N)
ROWS = [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 24, 25, 64, 129, 239, 240, 241, 300]
SMALLEST_NORMAL = 2.0**-126
HAS_INSTRUCTION = TILES.name.endswith("instruction")


def _product(x: torch.Tensor, packed: object) -> torch.Tensor:
    out = torch.full((x.shape[0], packed.out_features), float("nan"))
    return linear(x, packed, out)


def _case(depth: int, columns: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(depth * 1000 + columns)
    x = torch.randn(300, depth, generator=generator) * scale
    weight = (torch.randn(columns, depth, generator=generator) * depth**-0.5 * scale).bfloat16()
    return x, weight, torch.randn(columns, generator=generator)


def _in_order(x: torch.Tensor, weight: torch.Tensor, *, flushes: bool = True) -> torch.Tensor:
    """The documented steps, one at a time."""

    def flushed(values: np.ndarray) -> np.ndarray:
        is_small = np.abs(values) < SMALLEST_NORMAL
        return np.where(is_small & flushes, np.copysign(np.float32(0), values), values)

    odd = x.shape[1] % 2
    x, weight = (torch.nn.functional.pad(t.bfloat16().float(), (0, odd)) for t in (x, weight))
    rows, columns = flushed(x.numpy()), flushed(weight.numpy())
    total = np.zeros((len(rows), len(columns)), np.float32)
    for k in range(rows.shape[1]):
        total = flushed(fma(rows[:, k : k + 1], columns[:, k], total))
    return torch.from_numpy(total)


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_rows_do_not_depend_on_their_number_or_place(depth: int, columns: int) -> None:
    x, weight, bias = _case(depth, columns)
    for leaves in (1, 4) if depth % 64 == 0 else (1,):
        packed = pack_bfloat16_linear(weight, bias, leaves)
        alone = torch.cat([_product(x[i : i + 1], packed) for i in range(300)])
        for rows in ROWS:
            for start in {0, 1, (300 - rows) // 2, 300 - rows}:
                if start + rows <= 300:
                    assert torch.equal(_product(x[start : start + rows], packed), alone[start : start + rows])


@pytest.mark.parametrize(("depth", "columns"), [*SHAPES, (4864, 64)])
def test_accuracy_against_float64(depth: int, columns: int) -> None:
    """Of the rounded inputs; rounding x is what distinguishes it from `pack_linear`."""
    x, weight, bias = _case(depth, columns)
    expected = x.bfloat16().double() @ weight.double().T + bias
    found = _product(x, pack_bfloat16_linear(weight, bias))
    assert (found - expected).norm() / expected.norm() < 1e-6
    error = (found - _product(x, pack_linear(weight, bias))).norm() / expected.norm()
    assert error < 2**-8
    assert error > 2**-12 or depth == 1


@pytest.mark.parametrize("scale", [1.0, 2.0**-63])
@pytest.mark.parametrize("depth", [1, 2, 63, 64, 65, 200])
def test_order_is_one_chain_that_flushes_subnormal_numbers(depth: int, scale: float) -> None:
    x, weight, _ = _case(depth, 33, scale)
    found = _product(x[:40], pack_bfloat16_linear(weight))
    assert torch.equal(found, _in_order(x[:40], weight))
    if scale < 1:
        kept = _in_order(x[:40], weight, flushes=False)
        assert not torch.equal(found, kept), "the control: subnormal numbers that are kept give other sums"


def test_the_sum_of_leaves_is_a_tree_of_chains() -> None:
    x, weight, _ = _case(128, 64)
    one, two, three, four = (_in_order(x[:5, i : i + 32], weight[:, i : i + 32]) for i in range(0, 128, 32))
    assert torch.equal(_product(x[:5], pack_bfloat16_linear(weight, None, 4)), (one + two) + (three + four))


@compiled()
def _tile(table: int, tile: int, x: int, x_row: int, panel: int, pairs: int, out: int, out_row: int) -> None:
    call_native(table, tile, x, x_row, panel, pairs, out, out_row)


@compiled()
def _round(table: int, x: int, count: int, out: int) -> None:
    call_native(table, ROUND_ROW, x, count, out)


def _of_tiles(group: NativeGroup, x: torch.Tensor, panel: torch.Tensor) -> torch.Tensor:
    """Words x [12, H] by words [H, 32], by every tile of a group [5, 12, 32]."""
    out = torch.full((len(TILE_ROWS), TILE_ROWS[0], PANEL), 7.0)
    pairs = x.shape[1]
    for tile in range(len(TILE_ROWS)):
        _tile(group.table, tile, x.data_ptr(), pairs * 4, panel.data_ptr(), pairs, out[tile].data_ptr(), PANEL * 4)
    return out


def _words(kind: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Any bits; or with exponents from 2**-15 to 1, or so small that differences are subnormal."""
    words = torch.randint(-(2**31), 2**31, shape, generator=generator)
    if kind != "any bits":
        half = (112 if kind == "normal" else 64) << 7
        words = (words & 0x87FF87FF) | (half << 16) | half
    return words.to(torch.int32)


def _with_halves_swapped(words: torch.Tensor) -> torch.Tensor:
    return (words << 16) | ((words >> 16) & 0xFFFF)


@pytest.mark.skipif(not HAS_INSTRUCTION, reason="this CPU has no AVX-512 BF16")
@pytest.mark.parametrize(
    ("kind", "pairs", "times"), [("normal", 90, 3), ("subnormal", 90, 3), ("any bits", 1, 100), ("any bits", 2, 100)]
)
def test_the_instruction_gives_the_bits_of_the_steps_it_stands_for(kind: str, pairs: int, times: int) -> None:
    generator = torch.Generator().manual_seed(5)
    instruction, steps = (pair_tiles(has_instruction=has) for has in (True, False))
    differing = 0
    for _ in range(times):
        x, panel = _words(kind, (12, pairs), generator), _words(kind, (pairs, 32), generator)
        with_it, without = _of_tiles(instruction, x, panel), _of_tiles(steps, x, panel)
        assert torch.equal(with_it.isnan(), without.isnan())
        assert torch.equal(with_it.nan_to_num(1.0).view(torch.int32), without.nan_to_num(1.0).view(torch.int32))
        for tile, rows in enumerate(TILE_ROWS):
            assert torch.equal(with_it[tile, :rows].nan_to_num(1.0), with_it[0, :rows].nan_to_num(1.0))
            assert (with_it[tile, rows:] == 7.0).all()
        in_other_order = _of_tiles(steps, _with_halves_swapped(x), _with_halves_swapped(panel))
        differing += int((in_other_order.nan_to_num(1.0) != with_it.nan_to_num(1.0)).sum())
    assert differing, "the control: the other half first gives other sums"


def test_the_steps_leave_the_control_register_as_it_was() -> None:
    words = torch.full((12, 4), 0x3F803F80, dtype=torch.int32)
    _of_tiles(pair_tiles(has_instruction=False), words, torch.full((4, 32), 0x3F803F80, dtype=torch.int32))
    assert np.float32(2.0**-130) * np.float32(0.5) == np.float32(2.0**-131)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 100])
def test_rounding_is_that_of_torch_with_a_zero_after_an_odd_count(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    words = torch.full((count // 2 + 2,), 7, dtype=torch.int32)
    _round(TILES.table, x.data_ptr(), count, words.data_ptr())
    halves = words[: (count + 1) // 2].view(torch.bfloat16).view(-1, 2).flip(1).reshape(-1)
    expected = torch.nn.functional.pad(x.bfloat16(), (0, count % 2))
    assert torch.equal(halves.isnan(), expected.isnan())
    assert torch.equal(halves.nan_to_num(1.0), expected.nan_to_num(1.0))
    assert (words[(count + 1) // 2 :] == 7).all()


def test_pairs_hold_the_even_element_in_their_upper_half() -> None:
    words = pairs_of(torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.bfloat16))
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x3F804000, 0xBF800000]


def test_result_does_not_depend_on_threads() -> None:
    x, weight, bias = _case(576, 960)
    packed = pack_bfloat16_linear(weight, bias)
    before = get_num_threads()
    results = []
    for threads in (1, 2):
        set_num_threads(threads)
        results.append(torch.cat([_product(x[:rows], packed) for rows in ROWS]))
    set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_storage_is_that_of_the_weight_and_other_dtypes_are_packed_as_ever() -> None:
    weight = torch.randn(64, 128)
    assert pack_bfloat16_linear(weight.bfloat16()).nbytes == 64 * 128 * 2
    for dtype in (torch.float32, torch.float16):
        assert not pack_bfloat16_linear(weight.to(dtype)).rounds_x


def test_nothing_is_written_past_a_row() -> None:
    x, weight, _ = _case(64, 33)
    buffer = torch.full((6, 33), 7.0)
    linear(x[:5], pack_bfloat16_linear(weight), buffer[:5])
    assert (buffer[5] == 7.0).all()
    assert not (buffer[:5] == 7.0).any()
