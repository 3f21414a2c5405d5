"""GPU gated delta layers. R requests, T rows, K key heads, V value heads, Dk and Dv their dimensions, C channels.

Three kernels. A program of the first owns a request and some channels of the convolution, one of the second a request,
a value head and a slice of Dv, whose state stays in registers: both walk the request's rows in order, and load a row
before the one at hand is finished. One of the third owns a row and a value head: norm and gate. A slot's numbers are
read and written by one program alone, which has read them before it writes any.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.activation.gpu import silu_times
from sempre.kernels.gated_delta.contract import DeltaWeights
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.sampling.gpu_elementary import exp32, sigmoid32, softplus32
from sempre.kernels.states import LayerState, StateBatch

# the convolution keeps the rows before in registers
MOST_CONV_WIDTH = 4
# channels of one program
CHANNELS = 128
# columns of the state of one program, which divide Dv: so few that one warp owns them, and sums need no barrier
COLUMNS = 16

_UNIT_EPS = tl.constexpr(1e-6)


@jit()
def _size_if(condition: Any, size: tl.constexpr) -> Any:
    """A bound for masks: a scalar that decides is no part of them."""
    return tl.where(condition, size, 0)


@jit()
def _before(states: Any, slot: Any, back: tl.constexpr, c: Any, C: tl.constexpr, W: tl.constexpr) -> Any:
    """The inputs `back` rows before the first one; zeros without a slot."""
    at = states + (slot * (W - 1) + (W - 1 - back)) * C + c
    return tl.load(at, mask=c < _size_if(slot >= 0, C), other=0.0).to(tl.float32)


@jit(runtime=("reads", "writes", "starts"))
def _conv(
    rows: Any,
    weight: Any,
    states: Any,
    reads: Any,
    writes: Any,
    starts: Any,
    mixed: Any,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    # the weight of the row itself, and of those one, two and three before
    w0 = tl.load(weight + (W - 1) * C + c, mask=inside, other=0.0)
    w1 = tl.load(weight + (W - 2) * C + c, mask=inside, other=0.0)
    w2, w3 = tl.zeros_like(w0), tl.zeros_like(w0)
    if W > 2:
        w2 = tl.load(weight + (W - 3) * C + c, mask=inside, other=0.0)
    if W > 3:
        w3 = tl.load(weight + c, mask=inside, other=0.0)
    wait_for_previous()
    first, end = tl.load(starts + request), tl.load(starts + request + 1)
    slot = tl.load(reads + request).to(tl.int64)
    x1 = _before(states, slot, 1, c, C, W)
    x2, x3 = tl.zeros_like(x1), tl.zeros_like(x1)
    if W > 2:
        x2 = _before(states, slot, 2, c, C, W)
    if W > 3:
        x3 = _before(states, slot, 3, c, C, W)
    row = first.to(tl.int64)
    following = tl.load(rows + row * WIDTH + c, mask=c < _size_if(row < end, C), other=0.0)
    for _ in range(first, end):
        x0 = following.to(tl.float32)
        following = tl.load(rows + (row + 1) * WIDTH + c, mask=c < _size_if(row + 1 < end, C), other=0.0)
        total = tl.zeros_like(x0)
        if W > 3:
            total = tl.fma(x3, w3, total)
        if W > 2:
            total = tl.fma(x2, w2, total)
        total = tl.fma(x0, w0, tl.fma(x1, w1, total))
        tl.store(mixed + row * C + c, silu_times(total, tl.full([BLOCK], 1.0, tl.float32)), mask=inside)
        target = tl.load(writes + row).to(tl.int64)
        at = states + target * (W - 1) * C + c
        written = c < _size_if(target >= 0, C)
        if W > 3:
            tl.store(at, x2, mask=written)
        if W > 2:
            tl.store(at + (W - 3) * C, x1, mask=written)
        tl.store(at + (W - 2) * C, x0, mask=written)
        x3, x2, x1 = x2, x1, x0
        row += 1


@jit(runtime=("reads", "writes", "starts", "scale"))
def _rule(
    mixed: Any,
    ba: Any,
    rate: Any,
    offset: Any,
    states: Any,
    reads: Any,
    writes: Any,
    starts: Any,
    out: Any,
    scale: Any,
    K: tl.constexpr,
    V: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    C: tl.constexpr = 2 * K * DK + V * DV
    request, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (V // K)
    i = tl.arange(0, BLOCK)
    j = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    own = (head * DK + i[:, None]) * DV + j[None, :]
    own_rate, own_offset = tl.load(rate + head), tl.load(offset + head)
    wait_for_previous()
    first, end = tl.load(starts + request), tl.load(starts + request + 1)
    slot = tl.load(reads + request).to(tl.int64)
    inside = (i < _size_if(slot >= 0, DK))[:, None] & (j < DV)[None, :]
    state = tl.load(states + slot * (V * DK * DV) + own, mask=inside, other=0.0)
    row = first.to(tl.int64)
    at, more = mixed + row * C, _size_if(row < end, DK)
    next_q = tl.load(at + key_head * DK + i, mask=i < more, other=0.0)
    next_k = tl.load(at + (K + key_head) * DK + i, mask=i < more, other=0.0)
    next_v = tl.load(at + 2 * K * DK + head * DV + j, mask=j < more * DV, other=0.0)
    for _ in range(first, end):
        q, k, v = next_q.to(tl.float32), next_k.to(tl.float32), next_v.to(tl.float32)
        at, more = mixed + (row + 1) * C, _size_if(row + 1 < end, DK)
        next_q = tl.load(at + key_head * DK + i, mask=i < more, other=0.0)
        next_k = tl.load(at + (K + key_head) * DK + i, mask=i < more, other=0.0)
        next_v = tl.load(at + 2 * K * DK + head * DV + j, mask=j < more * DV, other=0.0)
        beta = sigmoid32(tl.load(ba + row * 2 * V + head))
        exponent = own_rate * softplus32(tl.load(ba + row * 2 * V + V + head) + own_offset)
        decay = tl.where(exponent == exponent, exp32(exponent), exponent)
        q = q * (scale / tl.sqrt_rn(tl.sum(q * q, axis=0) + _UNIT_EPS))
        k = k * (1.0 / tl.sqrt_rn(tl.sum(k * k, axis=0) + _UNIT_EPS))
        state = state * decay
        error = (v - tl.sum(state * k[:, None], axis=0)) * beta
        state = state + k[:, None] * error[None, :]
        tl.store(out + row * (V * DV) + head * DV + j, tl.sum(state * q[:, None], axis=0))
        target = tl.load(writes + row).to(tl.int64)
        written = (i < _size_if(target >= 0, DK))[:, None] & (j < DV)[None, :]
        tl.store(states + target * (V * DK * DV) + own, state, mask=written)
        row += 1


@jit(runtime=("eps",))
def _norm_and_gate(
    rows: Any,
    weight: Any,
    out: Any,
    eps: Any,
    C: tl.constexpr,
    V: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < DV
    w = tl.load(weight + i, mask=inside, other=0.0)
    wait_for_previous()
    z = tl.load(rows + row * (C + V * DV) + C + head * DV + i, mask=inside, other=0.0).to(tl.float32)
    at = out + (row * V + head) * DV + i
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / DV + eps)
    tl.store(at, silu_times(z, value * factor * w), mask=inside)


def gated_delta(
    rows: torch.Tensor,
    ba: torch.Tensor,
    weights: DeltaWeights,
    state: LayerState,
    batch: StateBatch,
    mixed: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """As the facade. ValueError for a wider convolution than MOST_CONV_WIDTH."""
    heads = weights.heads
    if heads.conv_width > MOST_CONV_WIDTH:
        raise ValueError(f"gated_delta: expected a convolution of at most {MOST_CONV_WIDTH}, found {heads.conv_width}")
    num_requests, channels, dim = batch.reads.shape[0], heads.channels, heads.value_dim
    slots = (batch.reads, batch.writes, batch.query_starts)
    _conv[(num_requests, triton.cdiv(channels, CHANNELS))](
        rows, weights.conv, state.conv, *slots, mixed,
        C=channels, WIDTH=rows.shape[1], W=heads.conv_width, BLOCK=CHANNELS, num_warps=4, **CHAINED,
    )  # fmt: skip
    _rule[(num_requests, heads.num_value_heads, dim // COLUMNS)](
        mixed, ba, weights.rate, weights.offset, state.recurrent, *slots, out, heads.key_dim**-0.5,
        K=heads.num_key_heads, V=heads.num_value_heads, DK=heads.key_dim, DV=dim,
        BLOCK=triton.next_power_of_2(heads.key_dim), COLUMNS=COLUMNS, num_warps=1, **CHAINED,
    )  # fmt: skip
    _norm_and_gate[(rows.shape[0], heads.num_value_heads)](
        rows, weights.norm, out, weights.eps,
        C=channels, V=heads.num_value_heads, DV=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1, **CHAINED,
    )  # fmt: skip
    return out
