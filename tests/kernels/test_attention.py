"""Paged attention with rope and cache write: decode, chunks and whole prompts give the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import kernel_reference as reference
import kv_parts_cases
import pytest
import torch
from nonfinite_cases import DAMAGES, Damage, sees

from sempre.kernels.attention import (
    HeadLayout,
    HeadNorms,
    KvCache,
    PagedBatch,
    ScoreParams,
    allocate_kv_cache,
    paged_attention,
)
from sempre.kernels.fp8 import FP8
from sempre.kernels.rope import RopeSpec, _frequencies, cos_sin_table, rope_and_cache_write
from sempre.kernels.threads import get_num_threads, set_num_threads

LENGTHS = [1, 17, 64, 150]
HEADS = [(9, 3, 64), (4, 4, 128), (14, 2, 64), (8, 1, 80), (4, 2, 96), (16, 1, 32), (4, 1, 16), (2, 1, 256)]
BLOCK = 16


@dataclass
class Sequences:
    """Random q, k, v rows of a few sequences with scattered block tables."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None
    norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.num_heads * 1000 + self.head_dim)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = [torch.randn(length, width, generator=generator) for length in LENGTHS]
        blocks = [-(-length // BLOCK) for length in LENGTHS]
        self.num_blocks = sum(blocks) + 3
        order = torch.randperm(self.num_blocks, generator=generator).to(torch.int32)
        self.tables = torch.zeros(len(LENGTHS), max(blocks), dtype=torch.int32)
        taken = 0
        for row, count in enumerate(blocks):
            self.tables[row, :count] = order[taken : taken + count]
            taken += count
        self.angles = cos_sin_table(RopeSpec(self.head_dim), 256)
        self.scores = ScoreParams(self.head_dim**-0.5, self.window, sinks=self.sinks)

    def empty_cache(self) -> KvCache:
        """A cache full of NaN: reading anything unwritten shows."""
        cache = allocate_kv_cache(self.num_blocks, self.num_kv_heads, self.head_dim, BLOCK, self.dtype)
        for part in cache.tensors:
            part.fill_(float("nan"))
        return cache

    def step(self, cache: KvCache, parts: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One forward step over `parts` (sequence, start, stop)."""
        rows = torch.cat([self.qkv[s][a:b] for s, a, b in parts]).clone()
        positions = torch.cat([torch.arange(a, b) for _, a, b in parts])
        slots = torch.cat([self.tables[s][torch.arange(a, b) // BLOCK].long() * BLOCK + torch.arange(a, b) % BLOCK
                           for s, a, b in parts])  # fmt: skip
        heads = HeadLayout(self.num_heads, self.num_kv_heads, self.head_dim)
        norms = HeadNorms(self.norm, self.norm, 1e-6) if self.norm is not None else None
        rope_and_cache_write(rows, positions, self.angles, slots, cache, heads, norms)
        sizes = [b - a for _, a, b in parts]
        starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        out = torch.full((rows.shape[0], self.num_heads * self.head_dim), float("nan"))
        ends = [b for _, _, b in parts]
        tables = self.tables[[s for s, _, _ in parts]].contiguous()
        batch = PagedBatch(tables, starts, torch.tensor(ends, dtype=torch.int32), max(sizes), max(ends))
        paged_attention(rows, cache, batch, heads, self.scores, out)
        return list(out.split(sizes))

    def whole(self) -> list[torch.Tensor]:
        return self.step(self.empty_cache(), [(s, 0, length) for s, length in enumerate(LENGTHS)])


def _norm(dim: int) -> torch.Tensor:
    return torch.rand(dim, generator=torch.Generator().manual_seed(dim))


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_and_chunks_give_the_bits_of_the_whole_prompt(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    sequences = Sequences(*heads, dtype, window, norm=_norm(heads[2]) if heads[0] % 2 == 0 else None)
    whole = sequences.whole()
    for size in (1, 7, 64, 65):
        cache = sequences.empty_cache()
        for start in range(0, max(LENGTHS), size):
            parts = [(s, start, min(length, start + size)) for s, length in enumerate(LENGTHS) if length > start]
            for out, (s, a, b) in zip(sequences.step(cache, parts), parts, strict=True):
                assert torch.equal(out, whole[s][a:b]), f"sequence {s}, rows {a}..{b}, chunks of {size}"


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_accuracy_against_float64(heads: tuple[int, int, int], window: int | None) -> None:
    num_heads, num_kv_heads, dim = heads
    sequences = Sequences(*heads, torch.float32, window, norm=_norm(dim))
    frequencies = torch.from_numpy(_frequencies(RopeSpec(dim)))
    for s, length in enumerate(LENGTHS):
        x = sequences.qkv[s].view(length, num_heads + 2 * num_kv_heads, dim)
        positions = torch.arange(length)
        q, k, v = x.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        q, k = (reference.rope(reference.rms_norm(y, sequences.norm, 1e-6), positions, frequencies) for y in (q, k))
        expected = reference.attention(q, k, v, positions, sequences.scores).reshape(length, -1)
        error = (sequences.whole()[s] - expected).norm() / expected.norm()
        assert error < 1e-6


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("heads", [(9, 3, 64), (16, 1, 32), (4, 4, 128)], ids=str)
def test_sinks(heads: tuple[int, int, int], window: int | None) -> None:
    """Each head's own; values of float64, and the bits of the whole prompt in chunks; without them other values."""
    num_heads, num_kv_heads, dim = heads
    sequences = Sequences(*heads, torch.float32, window, sinks=torch.linspace(-1.0, 8.0, num_heads))
    whole = sequences.whole()
    frequencies = torch.from_numpy(_frequencies(RopeSpec(dim)))
    for s, length in enumerate(LENGTHS):
        x = sequences.qkv[s].view(length, num_heads + 2 * num_kv_heads, dim)
        q, k, v = x.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        q, k = (reference.rope(y, torch.arange(length), frequencies) for y in (q, k))
        expected = reference.attention(q, k, v, torch.arange(length), sequences.scores)
        error = (whole[s].view(expected.shape) - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))
        assert (error < 1e-6).all(), "of each head: a large sink leaves small values"
    for size in (1, 7, 65):
        cache = sequences.empty_cache()
        for start in range(0, max(LENGTHS), size):
            parts = [(s, start, min(length, start + size)) for s, length in enumerate(LENGTHS) if length > start]
            for out, (s, a, b) in zip(sequences.step(cache, parts), parts, strict=True):
                assert torch.equal(out, whole[s][a:b]), f"sequence {s}, rows {a}..{b}, chunks of {size}"
    without = Sequences(*heads, torch.float32, window).whole()
    assert not any(torch.equal(a, b) for a, b in zip(whole, without, strict=True))


def test_sinks_that_do_not_fit_are_refused() -> None:
    for wrong in (torch.zeros(8), torch.zeros(9, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"paged_attention: expected float32 sinks \(9,\), found torch"):
            Sequences(9, 3, 64, torch.float32, sinks=wrong).whole()


def test_result_does_not_depend_on_threads() -> None:
    sequences = Sequences(9, 3, 64, torch.float32)
    before = get_num_threads()
    set_num_threads(1)
    one = sequences.whole()
    set_num_threads(2)
    two = sequences.whole()
    set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_control_the_ordinary_attention_gives_a_decode_row_other_bits() -> None:
    """The library's own attention fails the comparison above, which shows that it can fail."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 150, 2, 64, generator=generator).transpose(1, 2) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    whole = attend(q, k, v, is_causal=True)[:, :, -1:]
    decode = attend(q[:, :, -1:], k, v)
    assert not torch.equal(whole, decode)


def test_tables_of_angles() -> None:
    plain = cos_sin_table(RopeSpec(64), 8)
    assert plain.shape == (8, 64)
    assert torch.equal(plain[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    linear = cos_sin_table(RopeSpec(64, scaling="linear", factor=2.0), 8)
    assert torch.equal(linear[6], plain[3])
    long_waves = _frequencies(RopeSpec(128, theta=500000.0, scaling="llama3", factor=8.0, low_freq_factor=1.0,
                                       high_freq_factor=4.0, original_max_position_embeddings=8192))  # fmt: skip
    unscaled = _frequencies(RopeSpec(128, theta=500000.0))
    assert long_waves[0] == unscaled[0]
    assert long_waves[-1] == unscaled[-1] / 8


def test_unsupported_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size must be one of \(16,\) on cpu, got 32"):
        allocate_kv_cache(2, 1, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16, got 40"):
        allocate_kv_cache(2, 1, 40, 16, torch.float32)


def test_arrays_that_are_not_a_batch_are_refused() -> None:
    lens = torch.ones(2, dtype=torch.int32)
    for wrong in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.int64), torch.ones(4, 2, dtype=torch.int32).T):
        with pytest.raises(ValueError, match=r"expected block_tables as contiguous torch\.int32"):
            PagedBatch(wrong, lens, lens, 1, 1)
    with pytest.raises(ValueError, match="contiguous keys and values of one dtype"):
        KvCache(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.float16))


def _call(rows: int, table: list[list[int]], starts: list[int], lens: list[int], width: int = 48) -> torch.Tensor:
    arrays = (torch.tensor(numbers, dtype=torch.int32) for numbers in (table, starts, lens))
    out = torch.full((rows, 16), 7.0)
    cache = allocate_kv_cache(2, 1, 16, BLOCK, torch.float32)
    return paged_attention(
        torch.zeros(rows, width), cache, PagedBatch(*arrays, rows, 16), HeadLayout(1, 1, 16), ScoreParams(1.0), out
    )


def test_a_batch_that_does_not_fit_is_refused() -> None:
    assert _call(2, [[1]], [0, 2], [2]).tolist() == [[0.0] * 16] * 2
    # blocks, rows and contexts that do not exist
    for table, starts, lens in (
        ([[2]], [0, 2], [2]),
        ([[-1]], [0, 2], [2]),
        ([[1]], [0, 3], [3]),
        ([[1]], [0, 2], [17]),
        ([[1]], [0, 2], [1]),
        ([[1]], [0, 1, 2], [2, 2]),
    ):
        with pytest.raises(IndexError, match=r"request [01] has rows, a context or blocks outside"):
            _call(2, table, starts, lens)
    with pytest.raises(ValueError, match=r"qkv \(2, 64\) does not fit 2 rows of HeadLayout"):
        _call(2, [[1]], [0, 2], [2], width=64)


def test_nothing_to_compute_leaves_the_rows_alone() -> None:
    assert _call(0, [[1]], [0, 0], [0]).shape == (0, 16)
    empty = torch.empty(0, dtype=torch.int32)
    cache = allocate_kv_cache(2, 1, 16, BLOCK, torch.float32)
    batch = PagedBatch(empty.view(0, 1), torch.zeros(1, dtype=torch.int32), empty, 0, 0)
    out = paged_attention(torch.zeros(2, 48), cache, batch, HeadLayout(1, 1, 16), ScoreParams(1.0), torch.ones(2, 16))
    assert out.tolist() == [[1.0] * 16] * 2


def test_a_batch_that_fits_one_cache_is_checked_against_the_next() -> None:
    """Layers share the batch, and a batch that fits is not checked again for a cache of the same size."""
    tables, starts, lens = ([[3]], [0, 2], [2])
    batch = PagedBatch(*(torch.tensor(part, dtype=torch.int32) for part in (tables, starts, lens)), 2, 2)

    def attend(num_blocks: int, num_rows: int) -> torch.Tensor:
        cache = allocate_kv_cache(num_blocks, 1, 16, BLOCK, torch.float32)
        qkv, out = torch.zeros(num_rows, 48), torch.ones(num_rows, 16)
        return paged_attention(qkv, cache, batch, HeadLayout(1, 1, 16), ScoreParams(1.0), out)

    for _ in range(2):
        assert attend(4, 2).tolist() == [[0.0] * 16] * 2
        for num_blocks, num_rows in ((3, 2), (4, 1)):
            with pytest.raises(IndexError, match="request 0 has rows, a context or blocks outside"):
                attend(num_blocks, num_rows)


@pytest.mark.parametrize(("position", "slot"), [(8, 0), (-1, 0), (0, 32), (0, -1)])
def test_rope_refuses_what_does_not_exist_before_it_writes(position: int, slot: int) -> None:
    cache = allocate_kv_cache(2, 1, 16, BLOCK, torch.float32)
    positions, slots = torch.tensor([3, position]), torch.tensor([1, slot])
    table = cos_sin_table(RopeSpec(16), 8)
    with pytest.raises(IndexError, match=f"row 1 has position {position} of 8 and slot {slot} of 32"):
        rope_and_cache_write(torch.ones(2, 48), positions, table, slots, cache, HeadLayout(1, 1, 16))
    assert not cache.v.any()


LONGEST = len(LENGTHS) - 1
DAMAGED_HEADS = [(9, 3, 64), (4, 4, 16), (4, 1, 32), (2, 1, 80)]


def _damaged(sequences: Sequences, damage: Damage, positions: Sequence[int]) -> None:
    """Put the damage into the rows of the longest sequence."""
    heads, kv_heads, dim = sequences.num_heads, sequences.num_kv_heads, sequences.head_dim
    for position in positions:
        row = sequences.qkv[LONGEST][position].view(heads + 2 * kv_heads, dim)
        damage.apply(row[heads : heads + kv_heads], row[heads + kv_heads :])


FP8_DAMAGES = [Damage("value", float("nan"), FP8), Damage("key", float("-inf"), FP8), Damage("value", 3e38, FP8)]
# every damage with and without a window, each at its own place
AT = (0, 15, 16, 63, 64, 100, 149)
CASES = [
    (damage, window, AT[(i + j) % len(AT)])
    for i, damage in enumerate(DAMAGES + FP8_DAMAGES)
    for j, window in enumerate((None, 37))
]


@pytest.mark.parametrize(("damage", "window", "position"), CASES, ids=str)
def test_rows_that_see_no_damage_keep_their_bits(damage: Damage, window: int | None, position: int) -> None:
    heads = DAMAGED_HEADS[position % len(DAMAGED_HEADS)]
    clean, sequences = (Sequences(*heads, damage.dtype, window) for _ in range(2))
    _damaged(sequences, damage, [position])
    expected = clean.whole()
    seen = sees(LENGTHS[LONGEST], [position], window)
    for size in (LENGTHS[LONGEST], 7, 65):
        cache = sequences.empty_cache()
        for start in range(0, max(LENGTHS), size):
            parts = [(s, start, min(n, start + size)) for s, n in enumerate(LENGTHS) if n > start]
            for out, (s, a, b) in zip(sequences.step(cache, parts), parts, strict=True):
                broken = seen[a:b] if s == LONGEST else torch.zeros(b - a, dtype=torch.bool)
                assert torch.equal(out[~broken], expected[s][a:b][~broken]), f"sequence {s}, chunks of {size}"
                assert not out[broken].isfinite().any(dim=1).any(), "a row that sees the damage must show it"


@pytest.mark.parametrize("window", [None, 37])
def test_masked_values_are_not_read(window: int | None) -> None:
    """Damage in the cache itself, of all keys that one row does not see: later ones, and those below its window."""
    sequences = Sequences(9, 3, 64, torch.float32, window)
    cache = sequences.empty_cache()
    whole = sequences.step(cache, [(s, 0, n) for s, n in enumerate(LENGTHS)])
    table = sequences.tables[LONGEST]
    for start, stop in ((100, 101), (97, 104), (60, 70)):
        rows = _rotated_queries(sequences, start, stop)
        for row in range(start, stop):
            damaged = KvCache(cache.k.clone(), cache.v.clone())
            for p in range(LENGTHS[LONGEST]):
                if p > row or (window is not None and p <= row - window):
                    damaged.v[table[p // 16], :, p % 16] = float("nan")
            out = torch.empty(stop - start, 9 * 64, dtype=torch.float32)
            starts = torch.tensor([0, stop - start], dtype=torch.int32)
            lens = torch.tensor([stop], dtype=torch.int32)
            batch = PagedBatch(table[None].contiguous(), starts, lens, stop - start, stop)
            paged_attention(rows, damaged, batch, HeadLayout(9, 3, 64), ScoreParams(64**-0.5, window), out)
            assert torch.equal(out[row - start], whole[LONGEST][row])
            assert out[row - start + 1 :].isnan().any(dim=1).all(), "later rows see some of it"


def _rotated_queries(sequences: Sequences, start: int, stop: int) -> torch.Tensor:
    """The rows after the step: rotated in place."""
    scratch = sequences.empty_cache()
    rows = sequences.qkv[LONGEST][start:stop].clone()
    slots = torch.arange(stop - start)
    rope_and_cache_write(rows, torch.arange(start, stop), sequences.angles, slots, scratch, HeadLayout(9, 3, 64))
    return rows


def test_control_a_weight_of_zero_does_not_mask_a_value() -> None:
    """The library's attention on the same rows: the damage reaches rows that do not see it."""
    q, k, v = (torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    v[..., 7, :] = float("nan")
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    assert (scores.softmax(-1) @ v).isnan().all()


@pytest.mark.parametrize("heads", kv_parts_cases.HEADS, ids=str)
def test_rows_of_keys_that_are_values_and_of_queries_only(heads: tuple[int, int, int]) -> None:
    kernels = kv_parts_cases.Kernels(rope_and_cache_write, paged_attention, allocate_kv_cache, "cpu")
    kv_parts_cases.check_kv_parts(kernels, heads, torch.float32, 1e-6)
