"""GPU rope, cache write and attention: accuracy, and equal bits however a sequence is computed."""

from __future__ import annotations

import kv_parts_cases
import pytest
import torch
from nonfinite_cases import DAMAGES, Damage
from paged_sequences import PagedSequences, check_damage

from sempre.kernels.attention import allocate_kv_cache, paged_attention
from sempre.kernels.rope import rope_and_cache_write

pytestmark = pytest.mark.gpu

LENGTHS = (1, 17, 64, 150, 515, 1300)
HEADS = [
    (32, 8, 128),
    (16, 8, 128),
    (9, 3, 64),
    (14, 2, 64),
    (8, 1, 80),
    (4, 2, 96),
    (4, 1, 256),
    (28, 4, 128),
    (8, 1, 512),
]
# every head shape in bfloat16, a few in the other dtypes
CASES = [
    *((heads, torch.bfloat16) for heads in HEADS),
    ((16, 8, 128), torch.float16),
    ((9, 3, 64), torch.float16),
    ((14, 2, 64), torch.float32),
    ((4, 2, 512), torch.float32),
    ((16, 2, 512), torch.float16),
    ((8, 1, 80), torch.float32),
]
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _sequences(heads: tuple[int, int, int], dtype: torch.dtype, **settings: object) -> PagedSequences:
    return PagedSequences(LENGTHS, *heads, dtype, "cuda", with_norm=heads[0] % 2 == 0, **settings)


# of scores whose standard deviation is about 1
SOFT_CAP = 1.5
CAPPED = [((8, 4, 256), torch.bfloat16), ((16, 8, 256), torch.float16), ((4, 2, 256), torch.float32)]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "dtype"), CAPPED, ids=str)
def test_soft_capped_scores(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    """Accuracy; chunks and decode rows have the bits of the whole; without the cap other values."""
    sequences = _sequences(heads, dtype, window=window, soft_cap=SOFT_CAP)
    whole = sequences.whole()
    for s, out in enumerate(whole):
        expected = sequences.expected(s)
        assert (out.cpu() - expected).norm() / expected.norm() < ROUNDING[dtype], f"sequence {s}"
    uncapped = _sequences(heads, dtype, window=window).whole()
    assert all(not torch.equal(a, b) for a, b, n in zip(whole, uncapped, LENGTHS, strict=True) if n > 1)
    _check_chunks(sequences, whole, (5, 37, 700))
    _check_decode_rows(sequences, whole)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((64, 8, 64), torch.bfloat16), ((14, 2, 64), torch.float16), ((8, 1, 80), torch.float32)],
    ids=str,
)
def test_sinks(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    """The same of sinks, also where splits run side by side or in turn."""
    sequences = _sequences(heads, dtype, window=window, with_sinks=True)
    whole = sequences.whole()
    for s, out in enumerate(whole):
        expected = sequences.expected(s)
        assert (out.cpu() - expected).norm() / expected.norm() < ROUNDING[dtype], f"sequence {s}"
    without = _sequences(heads, dtype, window=window).whole()
    assert all(not torch.equal(a, b) for a, b in zip(whole, without, strict=True))
    _check_chunks(sequences, whole, (5, 37, 700))
    _check_decode_rows(sequences, whole)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "dtype"), CASES, ids=str)
def test_accuracy_against_float64(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    sequences = _sequences(heads, dtype, window=window)
    for s, out in enumerate(sequences.whole()):
        expected = sequences.expected(s)
        assert (out.cpu() - expected).norm() / expected.norm() < ROUNDING[dtype], f"sequence {s}"


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "dtype"), CASES, ids=str)
def test_decode_and_chunks_give_the_bits_of_the_whole_prompt(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    sequences = _sequences(heads, dtype, window=window)
    _check_chunks(sequences, sequences.whole(), (5, 16, 37, 128, 700))


def _check_chunks(sequences: PagedSequences, whole: list[torch.Tensor], sizes: tuple[int, ...]) -> None:
    workspace = sequences.workspace()
    for size in sizes:
        cache = sequences.empty_cache()
        for start in range(0, max(LENGTHS), size):
            parts = [(s, start, min(n, start + size)) for s, n in enumerate(LENGTHS) if n > start]
            found = sequences.step(cache, parts, workspace=workspace, padding=start % 3)
            for out, (s, a, b) in zip(found, parts, strict=True):
                assert torch.equal(out, whole[s][a:b]), f"sequence {s}, rows {a}..{b}, chunks of {size}"


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_rows_by_splits_in_parallel_or_in_turn(heads: tuple[int, int, int], window: int | None) -> None:
    sequences = _sequences(heads, torch.bfloat16, window=window)
    _check_decode_rows(sequences, sequences.whole())


def _check_decode_rows(sequences: PagedSequences, whole: list[torch.Tensor]) -> None:
    cache = sequences.empty_cache()
    sequences.step(cache, [(s, 0, n) for s, n in enumerate(LENGTHS)])
    workspace = sequences.workspace()
    for back in (1, 2, 60, 150):
        parts = [(s, n - back, n - back + 1) for s, n in enumerate(LENGTHS) if n >= back]
        for options in ({}, {"workspace": workspace}, {"workspace": workspace, "padding": 11}, {"slack": 3000}):
            for batch in (parts, parts[-1:], parts * 40):
                for out, (s, a, b) in zip(sequences.step(cache, batch, **options), batch, strict=True):
                    assert torch.equal(out, whole[s][a:b]), f"sequence {s}, row {a}, {sorted(options)}, {len(batch)}"


def test_block_size_is_not_in_the_result() -> None:
    results = [_sequences((32, 8, 128), torch.bfloat16, block=block).whole() for block in (16, 32, 64)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("position", [0, 63, 64, 511, 512, 1023, 1290])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_rows_that_see_no_damage_keep_their_bits(damage: Damage, window: int | None, position: int) -> None:
    sequences = PagedSequences((1300, 300), 16, 8, 128, damage.dtype, "cuda", block=64, window=window)
    parts = [(0, max(0, position - 9), min(1300, position + 9)), (1, 299, 300)]
    check_damage(sequences, damage, [position], parts)


def test_a_captured_graph_serves_other_contents() -> None:
    """The grid is fixed at capture; lengths, tables and rows change under it."""
    from sempre.kernels.attention import PagedBatch, ScoreParams, paged_attention

    sequences = _sequences((32, 8, 128), torch.bfloat16)
    cache = sequences.empty_cache()
    sequences.step(cache, [(s, 0, n) for s, n in enumerate(LENGTHS)])
    workspace = sequences.workspace()
    qkv = torch.randn(4, 48 * 128, device="cuda").bfloat16()
    tables = sequences.tables[[5, 4, 3, 2]].cuda()
    starts = torch.arange(5, dtype=torch.int32, device="cuda")
    lens = torch.tensor([1300, 3, 150, 0], dtype=torch.int32, device="cuda")
    out = torch.zeros(4, 32 * 128, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        batch = PagedBatch(tables, starts, lens, max_query_len=1, max_context_len=1300)
        paged_attention(qkv, cache, batch, sequences.heads, ScoreParams(0.1), out, workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for contents in ([1300, 515, 150, 64], [7, 512, 1, 0], [1025, 513, 64, 1]):
        lens.copy_(torch.tensor(contents, dtype=torch.int32))
        qkv.normal_()
        run()
        eager = out.clone()
        out.zero_()
        graph.replay()
        used = [i for i, n in enumerate(contents) if n]
        assert torch.equal(out[used], eager[used])
        assert not out[[i for i, n in enumerate(contents) if not n]].any()


def test_padding_rows_write_nothing_to_the_cache() -> None:
    from sempre.kernels.rope import rope_and_cache_write

    sequences = _sequences((32, 8, 128), torch.bfloat16)
    cache = sequences.empty_cache()
    rope_and_cache_write(
        sequences.qkv[1].clone(), torch.zeros(17, dtype=torch.int64, device="cuda"), sequences.angles,
        torch.full((17,), -1, dtype=torch.int64, device="cuda"), cache, sequences.heads, sequences.norms,
    )  # fmt: skip
    assert cache.k.isnan().all()
    assert cache.v.isnan().all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("heads", kv_parts_cases.HEADS, ids=str)
def test_rows_of_keys_that_are_values_and_of_queries_only(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    kernels = kv_parts_cases.Kernels(
        rope_and_cache_write, paged_attention, lambda *sizes: allocate_kv_cache(*sizes, device), "cuda"
    )
    kv_parts_cases.check_kv_parts(kernels, heads, dtype, ROUNDING[dtype])
