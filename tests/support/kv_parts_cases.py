"""Rows that hold keys which are the values too, or queries only, and values that are normed: on any device.

# T tokens, Hq query heads, Hkv key heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import kernel_reference as reference
import torch

from sempre.kernels.attention import HeadLayout, HeadNorms, KvCache, PagedBatch, ScoreParams
from sempre.kernels.rope import RopeSpec, cos_sin_table

EPS = 1e-6
HEADS = [(4, 2, 32), (3, 1, 80), (8, 1, 512)]
TOKENS = 70


class Kernels(NamedTuple):
    """One device's."""

    rope: Callable[..., object]
    attention: Callable[..., torch.Tensor]
    allocate: Callable[..., KvCache]
    """blocks, key heads, head dimension, block size, dtype"""
    device: str


def check_kv_parts(kernels: Kernels, heads: tuple[int, int, int], dtype: torch.dtype, rounding: float) -> None:
    """Keys that are values too have the bits of keys and values that happen to be equal; queries alone those of queries
    beside keys; normed values are right."""
    layout = HeadLayout(*heads)
    generator = torch.Generator().manual_seed(sum(heads))
    parts = [torch.randn(TOKENS, count, heads[2], generator=generator).to(dtype) for count in heads[:2]]
    weights = [(torch.rand(heads[2], generator=generator) + 0.5).to(dtype).to(kernels.device) for _ in range(2)]
    norms = HeadNorms(weights[0], weights[1], EPS, values=True)
    queries, keys = parts
    both = _run(kernels, layout, [queries, keys, keys], norms)
    expected = reference.rms_norm(keys, torch.ones(heads[2]), EPS)
    found = both.cache.v.cpu().transpose(1, 2).reshape(-1, *heads[1:])[:TOKENS]
    assert (found - expected).norm() / expected.norm() < rounding
    one = _run(kernels, replace(layout, kv_parts=1), [queries, keys], norms)
    assert torch.equal(one.queries, both.queries)
    assert torch.equal(one.cache.k, both.cache.k)
    assert torch.equal(one.cache.v, both.cache.v)
    assert torch.equal(one.attended, both.attended)
    none = _run(kernels, replace(layout, kv_parts=0), [queries], replace(norms, k=None), both.cache)
    assert torch.equal(none.queries, both.queries)
    assert torch.equal(none.attended, both.attended)
    # a control: without the norm other values are kept
    other = _run(kernels, replace(layout, kv_parts=1), [queries, keys], replace(norms, values=False))
    assert torch.equal(other.cache.k, both.cache.k)
    assert not torch.equal(other.cache.v, both.cache.v)


class Run(NamedTuple):
    queries: torch.Tensor
    """after rope"""
    cache: KvCache
    attended: torch.Tensor


def _run(
    kernels: Kernels, layout: HeadLayout, parts: list[torch.Tensor], norms: HeadNorms, cache: KvCache | None = None
) -> Run:
    """One step of all tokens; with a `cache` that is filled already, which must stay as it is."""
    dtype = parts[0].dtype
    rows = torch.cat([part.reshape(TOKENS, -1) for part in parts], dim=1).to(kernels.device)
    blocks = -(-TOKENS // 16)
    before = cache.v.clone() if cache is not None else None
    used = cache or kernels.allocate(blocks, layout.num_kv_heads, layout.head_dim, 16, dtype)
    positions = torch.arange(TOKENS, device=kernels.device)
    table = cos_sin_table(RopeSpec(layout.head_dim), TOKENS).to(kernels.device)
    kernels.rope(rows, positions, table, positions, used, layout, norms)
    assert before is None or torch.equal(before, used.v)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": kernels.device}
    batch = PagedBatch(
        torch.arange(blocks, **integers)[None].contiguous(),
        torch.tensor([0, TOKENS], **integers),
        torch.tensor([TOKENS], **integers),
        TOKENS,
        TOKENS,
    )
    out = torch.empty(TOKENS, layout.num_heads * layout.head_dim, dtype=dtype, device=kernels.device)
    kernels.attention(rows, used, batch, layout, ScoreParams(0.1), out)
    return Run(rows[:, : layout.num_heads * layout.head_dim].clone(), used, out)
