"""Memory that attention works on: the paged cache of a layer, and scratch for splits that run in parallel.

# Hq query heads, Hkv key heads, D head dim, B keys per block
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KvCache:
    """One layer's keys and values, in the storage dtype.

    On CPU `k` is [blocks, Hkv, D, B] (transposed) and `v` [blocks, Hkv, B, D]; on a GPU both are [blocks, Hkv, B, D].
    """

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class AttentionWorkspace:
    """Partials of splits: `acc` [tokens, Hq, splits, D], `m` and `l` [tokens, Hq, splits], float32."""

    acc: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor  # noqa: E741

    @property
    def max_splits(self) -> int:
        return int(self.acc.shape[2])

    @property
    def nbytes(self) -> int:
        return int(self.acc.nbytes + self.m.nbytes + self.l.nbytes)

    def holds(self, tokens: int, splits: int) -> bool:
        return tokens <= self.acc.shape[0] and splits <= self.max_splits


def allocate_gpu_cache(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KvCache:
    """A cache of zeros on a GPU. ValueError unless block_size is 16, 32 or 64 and head_dim a multiple of 16."""
    if block_size not in (16, 32, 64):
        raise ValueError(f"block_size must be 16, 32 or 64 on a GPU, got {block_size}")
    if head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return KvCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
