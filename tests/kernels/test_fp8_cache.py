"""A KV cache of fp8: the documented rule of its bytes and scales, what is read of it, and accuracy."""

from __future__ import annotations

from typing import NamedTuple

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.attention import HeadLayout, KvCache, PagedBatch, ScoreParams, allocate_kv_cache, paged_attention
from sempre.kernels.fp8 import FP8, SMALLEST_SCALE
from sempre.kernels.rope import RopeSpec, cos_sin_table, rope_and_cache_write

LENGTH, BLOCK = 150, 16
HEADS = [(9, 3, 64), (4, 4, 128), (8, 1, 80), (4, 1, 16)]


class Rows(NamedTuple):
    """One row a token."""

    q: torch.Tensor
    """[T, Hq, D]"""
    k: torch.Tensor
    v: torch.Tensor


def rows_of(heads: tuple[int, int, int]) -> Rows:
    """Keys and values whose sizes differ by orders of magnitude from token to token."""
    num_heads, num_kv_heads, dim = heads
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (
        torch.randn(LENGTH, count, dim, generator=generator) for count in (num_heads, num_kv_heads, num_kv_heads)
    )
    sizes = torch.logspace(-3, 1, LENGTH)[torch.randperm(LENGTH, generator=generator)][:, None, None]
    return Rows(q, k, v * sizes)


def written(rows: Rows, cache: KvCache) -> torch.Tensor:
    """The rows [T, …] after they went to the cache, all at position 0, where nothing turns."""
    length, num_kv_heads, dim = rows.k.shape
    qkv = torch.cat([part.reshape(length, -1) for part in rows], dim=1)
    positions = torch.zeros(length, dtype=torch.int64)
    layout = HeadLayout(rows.q.shape[1], num_kv_heads, dim)
    table = cos_sin_table(RopeSpec(dim), 1)
    rope_and_cache_write(qkv, positions, table, torch.arange(length), cache, layout)
    return qkv


def cache_of(rows: Rows, dtype: torch.dtype) -> KvCache:
    _, num_kv_heads, dim = rows.k.shape
    return allocate_kv_cache(-(-len(rows.k) // BLOCK), num_kv_heads, dim, BLOCK, dtype)


def attended(rows: Rows, qkv: torch.Tensor, cache: KvCache) -> torch.Tensor:
    """[T, Hq, D] of one sequence."""
    length, num_heads, dim = rows.q.shape
    tables = torch.arange(cache.k.shape[0], dtype=torch.int32)[None]
    starts, lens = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, length], [length]))
    layout, out = HeadLayout(num_heads, rows.k.shape[1], dim), torch.empty(length, num_heads * dim)
    batch = PagedBatch(tables, starts, lens, length, length)
    return paged_attention(qkv, cache, batch, layout, ScoreParams(dim**-0.5), out).view(length, num_heads, dim)


def read(cache: KvCache) -> KvCache:
    """A float32 cache with what is read of an fp8 one."""
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    return KvCache(cache.k.float() * cache.k_scale[:, :, None, :], cache.v.float() * cache.v_scale[..., None])


def by_tokens(cache: KvCache, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [T, Hkv, D] of a float32 cache."""
    keys = cache.k.permute(0, 3, 1, 2).flatten(0, 1)
    return keys[:length], cache.v.permute(0, 2, 1, 3).flatten(0, 1)[:length]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_bytes_and_scales_follow_the_documented_rule(heads: tuple[int, int, int]) -> None:
    rows = rows_of(heads)
    rows.k[3] = 0.0
    rows.v[4] *= 1e-30
    rows.v[5] *= 1e36
    rows.k[6, :, ::2] *= 1e-5
    cache = cache_of(rows, FP8)
    written(rows, cache)
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    for values, found, scales in (
        (rows.k, cache.k.permute(0, 3, 1, 2), cache.k_scale),
        (rows.v, cache.v.permute(0, 2, 1, 3), cache.v_scale),
    ):
        expected = (values.abs().amax(2) / 448.0).clamp_min(SMALLEST_SCALE)
        assert torch.equal(scales.transpose(1, 2).flatten(0, 1)[:LENGTH], expected)
        elements = (values / expected[..., None]).to(FP8).float()
        assert torch.equal(found.flatten(0, 1)[:LENGTH].float(), elements)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_what_is_read_is_near_what_was_written(heads: tuple[int, int, int]) -> None:
    """Half a step of three bits of mantissa, or of the smallest step beside the row's greatest."""
    rows = rows_of(heads)
    cache = cache_of(rows, FP8)
    written(rows, cache)
    for expected, found in zip((rows.k, rows.v), by_tokens(read(cache), LENGTH), strict=True):
        most = torch.maximum(expected.abs() / 16, expected.abs().amax(2, keepdim=True) * (2.0**-10 / 448))
        assert ((found - expected).abs() <= most * 1.001).all()
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_result_is_that_of_a_float32_cache_with_what_is_read(heads: tuple[int, int, int]) -> None:
    rows = rows_of(heads)
    cache, plain = cache_of(rows, FP8), cache_of(rows, torch.float32)
    qkv = written(rows, cache)
    written(rows, plain)
    found = attended(rows, qkv, cache)
    assert torch.equal(found, attended(rows, qkv, read(cache)))
    assert not torch.equal(found, attended(rows, qkv, plain))  # control: the cache rounds
    keys, values = by_tokens(read(cache), LENGTH)
    positions, scores = torch.arange(LENGTH), ScoreParams(heads[2] ** -0.5)
    exact = reference.attention(rows.q, keys, values, positions, scores)
    assert (found - exact).norm() / exact.norm() < 1e-6
    unrounded = reference.attention(*rows, positions, scores)
    assert (found - unrounded).norm() / unrounded.norm() < 0.05


def test_a_byte_each_and_a_scale_per_token_and_head() -> None:
    sizes = {
        dtype: sum(part.nbytes for part in allocate_kv_cache(7, 3, 64, BLOCK, dtype).tensors)
        for dtype in (FP8, torch.bfloat16, torch.float32)
    }
    assert sizes[FP8] == 2 * 7 * BLOCK * 3 * (64 + 4)
    assert sizes[torch.bfloat16] / sizes[FP8] == 128 / 68
    assert sizes[torch.float32] / sizes[FP8] == 256 / 68


def test_caches_that_cannot_be_are_refused() -> None:
    part, scale = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16)
    narrow = part.to(FP8)
    with pytest.raises(ValueError, match=r"expected two scales with torch\.float8_e4m3fn and none else, found 0"):
        KvCache(narrow, narrow)
    with pytest.raises(ValueError, match=r"and none else, found 2, torch\.float32"):
        KvCache(part, part, scale, scale)
    with pytest.raises(ValueError, match=r"scales \(1, 1, 16\), found torch\.float32 \(1, 1, 8\)"):
        KvCache(narrow, narrow, scale[..., :8].contiguous(), scale)
    with pytest.raises(ValueError, match="is for CPUs only, got cuda"):
        allocate_kv_cache(1, 1, 16, 16, FP8, torch.device("cuda"))
