"""Rotation and cache write with the shapes of a model: what the decoder does and the self-tests check."""

from __future__ import annotations

import torch

from sempre.kernels.attention import KvCache
from sempre.kernels.rope import rope_and_cache_write
from sempre.workers.models.spec import ModelSpec


def rotate_and_write(
    spec: ModelSpec,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: KvCache,
    *,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    """`rope_and_cache_write` on qkv [T, (Hq + 2 Hkv) D] and one layer's cache; positions and slots int64 [T]."""
    rope_and_cache_write(
        qkv,
        positions,
        table,
        slot_mapping,
        cache.k,
        cache.v,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=spec.rms_norm_eps,
    )
