"""GPU: optional per-head RMSNorm of q, k and v, rope, and cache write, in one pass over the fused qkv rows.

# T tokens, Hq query heads, Hkv key heads, D head dim, B block size; caches [blocks, Hkv, B, D]
A program owns one token and HEADS query heads, or HEADS key heads with their values. Float32 inside; q is rounded into
qkv, k and v into the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.attention.contract import HeadLayout, HeadNorms, KvCache
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous

HEADS = 8


@jit()
def _unweighted(low: Any, high: Any, eps: Any, DIM: tl.constexpr) -> Any:
    squares = tl.sum(low * low + high * high, axis=1)
    factor = (1.0 / tl.sqrt_rn(squares / DIM + eps))[:, None]
    return low * factor, high * factor


@jit()
def _normalised(low: Any, high: Any, w_low: Any, w_high: Any, eps: Any, DIM: tl.constexpr) -> Any:
    low, high = _unweighted(low, high, eps, DIM)
    return low * w_low.to(tl.float32)[None, :], high * w_high.to(tl.float32)[None, :]


@jit()
def _not_finite(low: Any, high: Any) -> Any:
    """Per row, how many elements are infinite or NaN."""
    # a finite number minus itself is zero, others give NaN
    return tl.sum(tl.where(low - low == 0.0, 0, 1) + tl.where(high - high == 0.0, 0, 1), axis=1)


@jit(runtime=("eps",))
def _rope(
    qkv: Any,
    positions: Any,
    table: Any,
    slots: Any,
    k_cache: Any,
    v_cache: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_VALUES: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    HALF: tl.constexpr = DIM // 2
    h = tl.arange(0, HEADS)
    i = tl.arange(0, HALF_BLOCK)
    inside = i < HALF
    row = qkv + token * (Q_HEADS + KV_PARTS * KV_HEADS) * DIM
    slot = tl.load(slots + token)
    # padding writes no head
    writing = tl.where(slot >= 0, KV_HEADS, 0)
    angle = table + tl.load(positions + token) * DIM + i
    if part < Q_PARTS:
        h += part * HEADS
        mask = (h < Q_HEADS)[:, None] & inside[None, :]
        at = row + h[:, None] * DIM + i[None, :]
        cosine = tl.load(angle, mask=inside, other=0.0)[None, :]
        sine = tl.load(angle + HALF, mask=inside, other=0.0)[None, :]
        if NORM:
            w_low = tl.load(q_norm + i, mask=inside, other=0.0)
            w_high = tl.load(q_norm + HALF + i, mask=inside, other=0.0)
        wait_for_previous()
        low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            low, high = _normalised(low, high, w_low, w_high, eps, DIM)
        tl.store(at, tl.fma(low, cosine, -(high * sine)), mask=mask)
        tl.store(at + HALF, tl.fma(high, cosine, low * sine), mask=mask)
    elif KV_PARTS > 0:
        h += (part - Q_PARTS) * HEADS
        mask = (h < writing)[:, None] & inside[None, :]
        at = row + (Q_HEADS + h)[:, None] * DIM + i[None, :]
        cosine = tl.load(angle, mask=inside, other=0.0)[None, :]
        sine = tl.load(angle + HALF, mask=inside, other=0.0)[None, :]
        if NORM:
            w_low = tl.load(k_norm + i, mask=inside, other=0.0)
            w_high = tl.load(k_norm + HALF + i, mask=inside, other=0.0)
        wait_for_previous()
        low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            low, high = _normalised(low, high, w_low, w_high, eps, DIM)
        k_low = tl.fma(low, cosine, -(high * sine)).to(k_cache.dtype.element_ty)
        k_high = tl.fma(high, cosine, low * sine).to(k_cache.dtype.element_ty)
        # where keys are values too, qkv still has them as they were
        v_at = at + (KV_PARTS - 1) * KV_HEADS * DIM
        v_low = tl.load(v_at, mask=mask, other=0.0)
        v_high = tl.load(v_at + HALF, mask=mask, other=0.0)
        if NORM_VALUES:
            v_low, v_high = _unweighted(v_low.to(tl.float32), v_high.to(tl.float32), eps, DIM)
        v_low, v_high = v_low.to(v_cache.dtype.element_ty), v_high.to(v_cache.dtype.element_ty)
        finite = (_not_finite(k_low, k_high) + _not_finite(v_low, v_high) == 0)[:, None]
        to = ((slot // BLOCK * KV_HEADS + h) * BLOCK + slot % BLOCK)[:, None] * DIM + i[None, :]
        tl.store(k_cache + to, tl.where(finite, k_low, float("nan")), mask=mask)
        tl.store(k_cache + to + HALF, tl.where(finite, k_high, float("nan")), mask=mask)
        tl.store(v_cache + to, tl.where(finite, v_low, 0.0), mask=mask)
        tl.store(v_cache + to + HALF, tl.where(finite, v_high, 0.0), mask=mask)
    else:
        wait_for_previous()


def rope_and_cache_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: KvCache,
    heads: HeadLayout,
    norms: HeadNorms | None = None,
) -> None:
    """See the facade; k in qkv keeps its old values."""
    kv_heads = heads.num_kv_heads if heads.kv_parts else 0
    parts = triton.cdiv(heads.num_heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    _rope[(positions.shape[0], parts)](
        qkv,
        positions,
        table,
        slot_mapping,
        cache.k,
        cache.v,
        norms.q if norms is not None else None,
        norms.k if norms is not None else None,
        norms.eps if norms is not None else 0.0,
        Q_HEADS=heads.num_heads,
        KV_HEADS=heads.num_kv_heads,
        KV_PARTS=heads.kv_parts,
        DIM=heads.head_dim,
        HALF_BLOCK=triton.next_power_of_2(heads.head_dim // 2),
        BLOCK=cache.k.shape[2],
        HEADS=HEADS,
        NORM=norms is not None,
        NORM_VALUES=norms is not None and norms.values,
        num_warps=2,
        **CHAINED,
    )
