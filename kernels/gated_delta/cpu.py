"""CPU gated delta layers. R requests, T rows, K key heads, V value heads, Dk and Dv their dimensions, C channels.

A task owns a request and some channels of the convolution, then a request and a value head, and walks its rows in
order. The state after a row lies in the slot that the row writes to, else in a buffer of the task: it is read from
where the row before left it, and nothing is copied.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import prange

from sempre.kernels.activation.cpu import silu, silu_and_mul_row
from sempre.kernels.gated_delta.contract import DeltaWeights
from sempre.kernels.jit import address_of, compiled, compiled_twice, keep
from sempre.kernels.norms.cpu import emit_rms_norm
from sempre.kernels.sampling.elementary import exp32, sigmoid32, softplus32
from sempre.kernels.states import LayerState, StateBatch
from sempre.kernels.vector_ir import (
    F32,
    I64,
    LANES,
    address_intrinsic,
    constant,
    fma,
    llvm_sqrt,
    load,
    loop,
    splat,
    store,
    tree_sum,
    vec,
)

# channels of one task of the convolution
CHANNELS = 512
# vectors of a state's row that are kept in registers together; bits do not depend on it
PANEL = 4
# of activations or of state, read and written
PARALLEL_ELEMENTS = 16_384


def _emit_conv(
    b: ir.IRBuilder, taps: ir.Value, width: ir.Value, weight: ir.Value, stride: ir.Value, count: ir.Value, out: ir.Value
) -> None:
    """silu of the weighted sum of `width` rows of inputs, whose addresses are at `taps`; weights are `stride` bytes
    apart."""

    def channels(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))

        def tap(b: ir.IRBuilder, j: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            row = load(b, b.add(taps, b.mul(j, I64(8))), I64)
            factor = load(b, b.add(b.add(weight, b.mul(j, stride)), offset), vec(F32))
            return [fma(b, load(b, b.add(row, offset), vec(F32)), factor, total[0])]

        [total] = loop(b, I64(0), width, 1, [constant(0.0)], tap)
        store(b, silu(b, total), b.add(out, offset))
        return carried

    loop(b, I64(0), count, LANES, [], channels)


def _emit_unit(b: ir.IRBuilder, x: ir.Value, width: ir.Value, eps: ir.Value, scale: ir.Value, out: ir.Value) -> None:
    """x times scale / sqrt(sum of squares + eps)."""

    def square(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        value = load(b, b.add(x, b.mul(i, I64(4))), vec(F32))
        return [fma(b, value, value, carried[0])]

    [squares] = loop(b, I64(0), width, LANES, [constant(0.0)], square)
    factor = splat(b, b.fdiv(scale, llvm_sqrt(b, b.fadd(tree_sum(b, squares), eps))))

    def times(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        store(b, b.fmul(load(b, b.add(x, offset), vec(F32)), factor), b.add(out, offset))
        return carried

    loop(b, I64(0), width, LANES, [], times)


class _Rule(NamedTuple):
    """One row of one head: the state at `before` becomes that at `after`, which may be the same; what is read of it
    goes to `out`. All but the factors are addresses."""

    before: ir.Value
    after: ir.Value
    q: ir.Value
    k: ir.Value
    v: ir.Value
    decay: ir.Value
    beta: ir.Value
    key_dim: ir.Value
    value_dim: ir.Value
    out: ir.Value

    def emit(self, b: ir.IRBuilder) -> None:
        whole = b.sub(self.value_dim, b.srem(self.value_dim, I64(PANEL * LANES)))
        loop(b, I64(0), whole, PANEL * LANES, [], partial(self._panel, PANEL))
        loop(b, whole, self.value_dim, LANES, [], partial(self._panel, 1))

    def _panel(self, vectors: int, b: ir.IRBuilder, j: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offsets = [b.mul(b.add(j, I64(n * LANES)), I64(4)) for n in range(vectors)]
        betas = splat(b, self.beta)
        errors = [
            b.fmul(b.fsub(load(b, b.add(self.v, offset), vec(F32)), recalled), betas)
            for offset, recalled in zip(offsets, self._recall(b, offsets), strict=True)
        ]
        for offset, value in zip(offsets, self._learn(b, offsets, errors), strict=True):
            store(b, value, b.add(self.out, offset))
        return carried

    def _recall(self, b: ir.IRBuilder, offsets: list[ir.Value]) -> list[ir.Value]:
        """Let the state decay; what it has for the key."""
        decays, step = splat(b, self.decay), b.mul(self.value_dim, I64(4))

        def body(b: ir.IRBuilder, i: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            key = splat(b, load(b, b.add(self.k, b.mul(i, I64(4))), F32))
            row, sums = b.mul(i, step), []
            for offset, total in zip(offsets, found, strict=True):
                at = b.add(row, offset)
                value = b.fmul(load(b, b.add(self.before, at), vec(F32)), decays)
                store(b, value, b.add(self.after, at))
                sums.append(fma(b, value, key, total))
            return sums

        return loop(b, I64(0), self.key_dim, 1, [constant(0.0)] * len(offsets), body)

    def _learn(self, b: ir.IRBuilder, offsets: list[ir.Value], errors: list[ir.Value]) -> list[ir.Value]:
        """Correct the state by the errors at the key; what it then has for the query."""
        step = b.mul(self.value_dim, I64(4))

        def body(b: ir.IRBuilder, i: ir.Value, read: list[ir.Value]) -> list[ir.Value]:
            place = b.mul(i, I64(4))
            key, query = (splat(b, load(b, b.add(x, place), F32)) for x in (self.k, self.q))
            row, sums = b.mul(i, step), []
            for offset, error, total in zip(offsets, errors, read, strict=True):
                at = b.add(self.after, b.add(row, offset))
                value = fma(b, key, error, load(b, at, vec(F32)))
                store(b, value, at)
                sums.append(fma(b, value, query, total))
            return sums

        return loop(b, I64(0), self.key_dim, 1, [constant(0.0)] * len(offsets), body)


def _emit_copy(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value) -> None:
    def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        offset = b.mul(i, I64(4))
        store(b, load(b, b.add(source, offset), vec(F32)), b.add(target, offset))
        return carried

    loop(b, I64(0), count, LANES, [], body)


_conv_row = address_intrinsic(_emit_conv)
_unit_row = address_intrinsic(_emit_unit)
_rule_row = address_intrinsic(lambda b, *operands: _Rule(*operands).emit(b))
_copy_row = address_intrinsic(_emit_copy)
_norm_row = address_intrinsic(emit_rms_norm)


@compiled()
def _conv_task(
    x: int,
    row_bytes: int,
    weight: np.ndarray,
    states: int,
    read: int,
    writes: np.ndarray,
    rows: Any,
    part: Any,
    out: int,
) -> None:
    """Rows [rows[0], rows[1]) of one request, channels [part[0], part[1])."""
    width, channels = weight.shape
    first, count = part[0], part[1] - part[0]
    before = np.zeros((width - 1, count), np.float32)
    slot_bytes = (width - 1) * channels * 4
    if read >= 0:
        for j in range(width - 1):
            _copy_row(states + read * slot_bytes + (j * channels + first) * 4, address_of(before[j]), count)
    taps = np.empty(width, np.int64)
    for t in range(rows[0], rows[1]):
        for j in range(width):
            back = t - (width - 1) + j
            if back >= rows[0]:
                taps[j] = x + back * row_bytes + first * 4
            else:
                taps[j] = address_of(before) + (width - 1 + back - rows[0]) * count * 4
        target = out + (t * channels + first) * 4
        _conv_row(address_of(taps), width, address_of(weight) + first * 4, channels * 4, count, target)
        if writes[t] >= 0:
            for j in range(1, width):
                _copy_row(taps[j], states + writes[t] * slot_bytes + ((j - 1) * channels + first) * 4, count)
    keep(before)
    keep(taps)


@compiled_twice
def _conv(
    x: int, row_bytes: int, weight: np.ndarray, states: int, reads: np.ndarray, writes: np.ndarray, starts: np.ndarray,
    out: int,
) -> None:  # fmt: skip
    channels = weight.shape[1]
    parts = (channels + CHANNELS - 1) // CHANNELS
    for task in prange(len(reads) * parts):
        r, first = task // parts, task % parts * CHANNELS
        part = (first, min(first + CHANNELS, channels))
        _conv_task(x, row_bytes, weight, states, reads[r], writes, (starts[r], starts[r + 1]), part, out)


@compiled()
def _decay(a: Any, rate: Any) -> Any:
    exponent = rate * softplus32(a)
    return exp32(exponent) if exponent == exponent else exponent


@compiled()
def _head_task(
    mixed: int, z: int, z_bytes: int, ba: np.ndarray, rate: np.ndarray, offset: np.ndarray, norm: np.ndarray,
    eps: float, states: int, read: int, writes: np.ndarray, rows: Any, heads: Any, v: int, out: int,
) -> None:  # fmt: skip
    """Rows [rows[0], rows[1]) of one request in value head `v`; heads is (K, V, Dk, Dv)."""
    num_keys, num_values, key_dim, value_dim = heads
    row_bytes = (2 * num_keys * key_dim + num_values * value_dim) * 4
    key_head = v // (num_values // num_keys)
    q, k = np.empty(key_dim, np.float32), np.empty(key_dim, np.float32)
    own = np.empty((key_dim, value_dim), np.float32)
    if read < 0:
        own[:] = 0.0
    head_bytes = key_dim * value_dim * 4
    before = states + (read * num_values + v) * head_bytes if read >= 0 else address_of(own)
    scale = np.float32(1.0) / np.sqrt(np.float32(key_dim))
    for t in range(rows[0], rows[1]):
        row = mixed + t * row_bytes
        _unit_row(row + key_head * key_dim * 4, key_dim, 1e-6, scale, address_of(q))
        _unit_row(row + (num_keys + key_head) * key_dim * 4, key_dim, 1e-6, 1.0, address_of(k))
        value = row + (2 * num_keys * key_dim + v * value_dim) * 4
        decay = _decay(ba[t, num_values + v] + offset[v], rate[v])
        after = states + (writes[t] * num_values + v) * head_bytes if writes[t] >= 0 else address_of(own)
        target = out + (t * num_values + v) * value_dim * 4
        beta = sigmoid32(ba[t, v])
        _rule_row(before, after, address_of(q), address_of(k), value, decay, beta, key_dim, value_dim, target)
        _norm_row(target, address_of(norm), value_dim, eps, target)
        silu_and_mul_row(z + t * z_bytes + v * value_dim * 4, target, value_dim, target)
        before = after
    keep(q)
    keep(k)
    keep(own)


@compiled_twice
def _heads(
    mixed: int, z: int, z_bytes: int, ba: np.ndarray, rate: np.ndarray, offset: np.ndarray, norm: np.ndarray,
    eps: float, states: int, reads: np.ndarray, writes: np.ndarray, starts: np.ndarray, heads: Any, out: int,
) -> None:  # fmt: skip
    num_values = heads[1]
    for task in prange(len(reads) * num_values):
        r, v = task // num_values, task % num_values
        _head_task(
            mixed, z, z_bytes, ba, rate, offset, norm, eps,
            states, reads[r], writes, (starts[r], starts[r + 1]), heads, v, out,
        )  # fmt: skip


def gated_delta(
    rows: torch.Tensor,
    ba: torch.Tensor,
    weights: DeltaWeights,
    state: LayerState,
    batch: StateBatch,
    mixed: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """As the facade."""
    heads = weights.heads
    slots = batch.reads.numpy(), batch.writes.numpy(), batch.query_starts.numpy()
    row_bytes = rows.shape[1] * 4
    conv = _conv.parallel if mixed.numel() >= PARALLEL_ELEMENTS else _conv.serial
    conv(rows.data_ptr(), row_bytes, weights.conv.numpy(), state.conv.data_ptr(), *slots, mixed.data_ptr())
    is_large = out.numel() * heads.key_dim >= PARALLEL_ELEMENTS
    (_heads.parallel if is_large else _heads.serial)(
        mixed.data_ptr(),
        rows.data_ptr() + heads.channels * 4,
        row_bytes,
        ba.numpy(),
        weights.rate.numpy(),
        weights.offset.numpy(),
        weights.norm.numpy(),
        weights.eps,
        state.recurrent.data_ptr(),
        *slots,
        (heads.num_key_heads, heads.num_value_heads, heads.key_dim, heads.value_dim),
        out.data_ptr(),
    )
    return out
