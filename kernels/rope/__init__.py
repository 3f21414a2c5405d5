"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and the write of keys and values into the paged cache.

out[i] = x[i] cos - x[i + D/2] sin, out[i + D/2] = x[i + D/2] cos + x[i] sin, for i < D/2. Each multiply and add is a
float32 operation, the second multiply fused; the table of angles is computed in float64.

A key or value that is not finite in the cache's dtype is written as a key of NaN and a value of zeros. Rows that see it
become NaN through its score, as they must; rows that do not mask its score and add zero times zero, where zero times
the value itself would be NaN. So a cache never holds a value that can affect a row which does not see it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sempre.kernels.attention.contract import HeadLayout, HeadNorms, KvCache
from sempre.kernels.checks import check_index, check_rows

__all__ = ["RopeSpec", "cos_sin_table", "rope_and_cache_write"]


def rope_and_cache_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: KvCache,
    heads: HeadLayout,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate q of qkv [T, (Hq + 2 Hkv) D] in place and write the rotated k, and v, to their slots of the cache.

    `positions` and `slot_mapping` int64 [T] (slot = block id * B + offset); `table` from `cos_sin_table`; `norms` are
    applied before. On a GPU a row with a negative slot (padding) writes nothing to the cache; whether k in qkv is
    rotated too depends on the device.

    IndexError on the CPU, before anything is written, for a position outside the table or a slot outside the cache.
    """
    check_rows("rope_and_cache_write", qkv, table)
    check_index("rope_and_cache_write", "positions", positions, torch.int64)
    check_index("rope_and_cache_write", "slot_mapping", slot_mapping, torch.int64)
    num_rows = positions.shape[0]
    heads.check_rows("rope_and_cache_write", qkv, num_rows)
    if not num_rows:
        return
    if qkv.is_cuda:
        from sempre.kernels.rope import gpu

        gpu.rope_and_cache_write(qkv, positions, table, slot_mapping, cache, heads, norms)
        return
    from sempre.kernels.rope import cpu

    num_slots = cache.k.shape[0] * cache.k.shape[3]
    wrong = cpu.first_outside(positions, table.shape[0], slot_mapping, num_slots)
    if wrong >= 0:
        raise IndexError(
            f"rope_and_cache_write: row {wrong} has position {int(positions[wrong])} of {table.shape[0]} and slot"
            f" {int(slot_mapping[wrong])} of {num_slots}"
        )
    cpu.rope_and_cache_write(qkv, positions, table, slot_mapping, cache, heads, norms)


@dataclass(frozen=True)
class RopeSpec:
    """`head_dim` D, base `theta`; `factor` of the scaling; the last three only for "llama3"."""

    head_dim: int
    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def _frequencies(spec: RopeSpec) -> np.ndarray:
    """Angular frequencies [D/2], float64."""
    frequencies = spec.theta ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "llama3":
        # long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1 model card)
        wavelengths = 2 * math.pi / frequencies
        ratio = spec.original_max_position_embeddings / wavelengths
        blend = (ratio - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * frequencies / spec.factor + blend * frequencies
    return frequencies


def cos_sin_table(spec: RopeSpec, max_len: int) -> torch.Tensor:
    """[max_len, D] float32: cosines in the first half of a row, sines in the second."""
    angles = np.arange(max_len, dtype=np.float64)[:, None] * _frequencies(spec)[None, :]
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
