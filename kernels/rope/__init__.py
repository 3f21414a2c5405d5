"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and the write of keys and values into the paged cache.

out[i] = x[i] cos - x[i + D/2] sin, out[i + D/2] = x[i + D/2] cos + x[i] sin, for i < D/2. Each multiply and add is a
float32 operation, the second multiply fused; the table of angles is computed in float64.

A key or value that is not finite in the cache's dtype is written as a key of NaN and a value of zeros. Rows that see it
become NaN through its score, as they must; rows that do not mask its score and add zero times zero, where zero times
the value itself would be NaN. So a cache never holds a value that can affect a row which does not see it. A
cache of fp8 has the same: there, the NaN is the key's scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from sempre.kernels.attention.contract import HeadLayout, HeadNorms, KvCache
from sempre.kernels.checks import check_index, check_rows
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.rope import cpu as _cpu
    from sempre.kernels.rope import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["RopeSpec", "cos_sin_table", "head_order", "rope_and_cache_write"]


def rope_and_cache_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: KvCache,
    heads: HeadLayout,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate q of qkv [T, (Hq + P Hkv) D] in place and write the rotated k, and v, to their slots of the cache, unless
    the rows hold queries only (P = 0).

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
        _gpu.rope_and_cache_write(qkv, positions, table, slot_mapping, cache, heads, norms)
        return
    num_slots = cache.k.shape[0] * cache.k.shape[3]
    wrong = _cpu.first_outside(positions, table.shape[0], slot_mapping, num_slots)
    if wrong >= 0:
        raise IndexError(
            f"rope_and_cache_write: row {wrong} has position {int(positions[wrong])} of {table.shape[0]} and slot"
            f" {int(slot_mapping[wrong])} of {num_slots}"
        )
    _cpu.rope_and_cache_write(qkv, positions, table, slot_mapping, cache, heads, norms)


@dataclass(frozen=True)
class RopeSpec:
    """Which angles the heads turn by, position by position."""

    head_dim: int
    """D"""
    theta: float = 10000.0
    """the base"""
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "none"] = "default"
    """none: the heads do not turn"""
    factor: float = 1.0
    """how much the longest waves are stretched; for linear, dynamic, llama3, yarn and proportional"""
    low_freq_factor: float = 1.0
    """for llama3, with the next"""
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """for dynamic, llama3, yarn and longrope"""
    beta_fast: float = 32.0
    """for yarn: waves that turn more often within the original context are kept"""
    beta_slow: float = 1.0
    """for yarn: waves that turn less often are stretched by `factor`"""
    truncate: bool = True
    """for yarn: whether the dimensions between which the two blend are rounded outwards"""
    attention_factor: float = 1.0
    """cosines and sines are multiplied by it; for yarn and longrope"""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """for longrope: how much each of the D / 2 waves is stretched, in tables that end within the original context, and
    in longer ones"""
    rotary_dim: int | None = None
    """how many dimensions of a head turn, the first ones; None: all"""
    interleaved: bool = False
    """whether the checkpoint's pairs are neighbours instead of half of those dimensions apart (`head_order`)"""
    turning_pairs: int = 0
    """for proportional: the first of the D / 2 pairs, which alone turn"""

    def is_long(self, max_len: int) -> bool:
        """Whether a table of so many positions is made with `long_factors`."""
        return self.scaling == "longrope" and max_len > self.original_max_position_embeddings

    def variant(self, max_len: int) -> str:
        """What the angles of a table depend on besides this, where they depend on its length."""
        if self.scaling == "dynamic" and max_len > self.original_max_position_embeddings:
            return f" {max_len}"
        return " long" if self.is_long(max_len) else ""


def _frequencies(spec: RopeSpec, max_len: int = 0) -> np.ndarray:
    """Angular frequencies [D/2] of a table for `max_len` positions, float64."""
    frequencies: np.ndarray = spec.theta ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    match spec.scaling:
        case "none":
            frequencies = np.zeros_like(frequencies)
        case "linear":
            frequencies = frequencies / spec.factor
        case "dynamic":
            # the base that stretches the longest wave to the whole table, where that exceeds the original context
            growth = spec.factor * max(max_len / spec.original_max_position_embeddings, 1.0) - (spec.factor - 1)
            base = spec.theta * growth ** (spec.head_dim / (spec.head_dim - 2))
            frequencies = base ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
        case "proportional":
            frequencies = frequencies / spec.factor
            frequencies[spec.turning_pairs :] = 0.0
        case "llama3":
            # long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1 model card)
            wavelengths = 2 * math.pi / frequencies
            ratio = spec.original_max_position_embeddings / wavelengths
            blend = (ratio - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
            blend = np.clip(blend, 0.0, 1.0)
            frequencies = (1 - blend) * frequencies / spec.factor + blend * frequencies
        case "yarn":
            stretched = _yarn_ramp(spec)
            frequencies = frequencies * (1 - stretched) + frequencies / spec.factor * stretched
        case "longrope":
            frequencies = frequencies / np.array(spec.long_factors if spec.is_long(max_len) else spec.short_factors)
    return frequencies


def _yarn_ramp(spec: RopeSpec) -> np.ndarray:
    """How far each wave is stretched [D/2], from 0 to 1 (Peng et al. 2023, arXiv 2309.00071)."""
    first, last = (
        spec.head_dim
        * math.log(spec.original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(spec.theta))
        for turns in (spec.beta_fast, spec.beta_slow)
    )
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.head_dim - 1)
    width = last - first if last != first else 0.001
    ramp: np.ndarray = np.clip((np.arange(spec.head_dim // 2, dtype=np.float64) - first) / width, 0.0, 1.0)
    return ramp


def cos_sin_table(spec: RopeSpec, max_len: int) -> torch.Tensor:
    """[max_len, D] float32: cosines in the first half of a row, sines in the second; ones and zeros do not turn."""
    turning = replace(spec, head_dim=spec.rotary_dim or spec.head_dim)
    angles = np.arange(max_len, dtype=np.float64)[:, None] * _frequencies(turning, max_len)[None, :]
    cosines, sines = np.cos(angles) * spec.attention_factor, np.sin(angles) * spec.attention_factor
    still = ((0, 0), (0, (spec.head_dim - turning.head_dim) // 2))
    halves = np.pad(cosines, still, constant_values=1.0), np.pad(sines, still)
    return torch.from_numpy(np.concatenate(halves, axis=1).astype(np.float32))


def head_order(spec: RopeSpec) -> list[int] | None:
    """Which dimension of the checkpoint's heads each of the kernels' is, whose pairs are i and i + D/2; None: the same.

    Scores do not depend on the order that queries and keys have in common.
    """
    turning, rest = spec.rotary_dim or spec.head_dim, list(range(spec.rotary_dim or spec.head_dim, spec.head_dim))
    if not spec.interleaved and not rest:
        return None
    pairs = list(range(turning))
    first, second = (pairs[::2], pairs[1::2]) if spec.interleaved else (pairs[: turning // 2], pairs[turning // 2 :])
    return [*first, *rest[: len(rest) // 2], *second, *rest[len(rest) // 2 :]]
