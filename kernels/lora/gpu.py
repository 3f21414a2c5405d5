"""GPU adapters: two launches a layer, of which the adapters' slots are data, so that a graph takes any.

# T rows, K in features, N out features, P parts, R padded rank, W = P R, S sums of SPLIT terms of K

The first computes x A^T in parts of SPLIT terms: a tile's rows are multiplied by the A of each adapter among them, and
each row keeps its own. The second adds these, multiplies by B, adds the base and rounds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.lora import AdapterRows, AdapterWeight, LoraShape, ScratchTensor

# terms of one sum of x A^T: changes the bits
SPLIT = 1024
BLOCK_K = 128
# columns of x A^T, and rows of a tile, of one program
BLOCK = 16
BLOCK_N = 256
# more rows are computed in tiles, since those of one request are adjacent
MOST_LONE_ROWS = 128


@jit(runtime=("T",))
def _shrink(
    x: Any,
    a: Any,
    slots: Any,
    sums: Any,
    T: Any,
    K: Any,
    W: Any,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """sums[s, t, w] = sum over ascending k of split s of x[t, k] a[slots[t], w, k]."""
    wait_for_previous()
    # one row fills a tile by itself, 16 times, or 16 rows do
    t = tl.program_id(0) * ROWS + tl.arange(0, BLOCK) % ROWS
    t_in = tl.minimum(t, T - 1)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(2)
    k = tl.arange(0, BK)
    slot = tl.load(slots + t_in)
    left = slot
    found = tl.zeros([BLOCK, BLOCK], tl.float32)
    current = tl.max(left, 0)
    while current >= 0:
        a_rows = a + (current.to(tl.int64) * W + w.to(tl.int64))[:, None] * K
        x_rows = x + t_in.to(tl.int64)[None, :] * K
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, K), BK):
            at = start + k
            a_tile = tl.load(a_rows + at[None, :], mask=(at < K)[None, :], other=0.0)
            x_tile = tl.load(x_rows + at[:, None], mask=(at < K)[:, None], other=0.0)
            acc = tl.dot(a_tile, x_tile, acc, input_precision="ieee")
        found = tl.where((left == current)[None, :], acc, found)
        left = tl.where(left == current, -1, left)
        current = tl.max(left, 0)
    at = sums + (split.to(tl.int64) * T + t_in)[None, :] * W + w[:, None]
    # a row that repeats another holds the same
    tl.store(at, found, mask=(slot >= 0)[None, :] & (t < T)[None, :])


@jit(runtime=("T",))
def _expand(
    base: Any,
    sums: Any,
    b: Any,
    slots: Any,
    starts: Any,
    out: Any,
    T: Any,
    N: Any,
    W: Any,
    R: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """out[t, n] = base[t, n] + fma chain over ascending r of (sum of sums[s, t, part R + r]) b[slots[t], r, n].

    starts [2, PARTS + 1]: first column of each part, and number of the first program that computes it.
    """
    wait_for_previous()
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t_in = tl.minimum(t, T - 1).to(tl.int64)
    block = tl.program_id(1)
    part = 0
    for index in tl.static_range(1, PARTS):
        part += (block >= tl.load(starts + PARTS + 1 + index)).to(tl.int32)
    first = tl.load(starts + part)
    end = tl.load(starts + part + 1)
    n = first + (block - tl.load(starts + PARTS + 1 + part)) * BN + tl.arange(0, BN)
    inside = (t < T)[:, None] & (n < end)[None, :]
    n_in = tl.minimum(n, end - 1)
    slot = tl.load(slots + t_in).to(tl.int64)
    value = tl.load(base + t_in[:, None] * N + n_in[None, :])
    if tl.max(slot, 0) >= 0:
        acc = tl.zeros([BT, BN], tl.float32)
        has_one = slot >= 0
        b_rows = tl.maximum(slot, 0) * R
        for r in range(R):
            at = sums + t_in * W + part * R + r
            inner = tl.load(at, mask=has_one, other=0.0)
            for index in tl.static_range(1, NUM_SUMS):
                inner += tl.load(at + tl.cast(index, tl.int64) * T * W, mask=has_one, other=0.0)
            factor = tl.load(b + (b_rows + r)[:, None] * N + n_in[None, :], mask=has_one[:, None], other=0.0)
            acc = tl.fma(tl.broadcast_to(inner[:, None], (BT, BN)), factor.to(tl.float32), acc)
        value = tl.where(has_one[:, None], value + acc, value)
    tl.store(out + t_in[:, None] * N + n_in[None, :], value.to(out.dtype.element_ty), mask=inside)


class GpuLoraSlots:
    """`a` [slots, W, K] and `b` [slots, R, N], zero where an adapter has a lower rank or none for a part."""

    def __init__(self, shape: LoraShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        rank, parts = shape.padded_rank, len(shape.widths)
        self._width = parts * rank
        self._a = torch.zeros(shape.num_slots, self._width, shape.in_features, dtype=dtype, device=device)
        self._b = torch.zeros(shape.num_slots, rank, shape.out_features, dtype=dtype, device=device)
        self._num_sums = triton.cdiv(shape.in_features, SPLIT)
        columns, programs = [0], [0]
        for width in shape.widths:
            columns.append(columns[-1] + width)
            programs.append(programs[-1] + triton.cdiv(width, BLOCK_N))
        self._num_programs = programs[-1]
        self._starts = torch.tensor([columns, programs], dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self._a.nbytes + self._b.nbytes

    def allocate(self, scratch: ScratchTensor, max_rows: int) -> None:
        """See the protocol."""
        self._sums = scratch("adapters", (self._num_sums * max_rows * self._width,), torch.float32)

    def put(self, slot: int, parts: tuple[AdapterWeight | None, ...]) -> None:
        """See the protocol; queued after the steps in flight."""
        rank, start = self.shape.padded_rank, 0
        a, b = self._a[slot], self._b[slot]
        a.zero_()
        b.zero_()
        for index, (part, width) in enumerate(zip(parts, self.shape.widths, strict=True)):
            if part is not None:
                own = part.a.shape[0]
                a[index * rank : index * rank + own].copy_(part.a)
                b[:own, start : start + width].copy_(part.b.t())
            start += width

    def add(self, x: torch.Tensor, base: torch.Tensor, rows: AdapterRows, out: torch.Tensor) -> torch.Tensor:
        """See the facade."""
        return self.run(x, base, rows, out, lone_rows=x.shape[0] <= MOST_LONE_ROWS)

    def run(
        self, x: torch.Tensor, base: torch.Tensor, rows: AdapterRows, out: torch.Tensor, *, lone_rows: bool
    ) -> torch.Tensor:
        """By one of the two forms, which have the same bits: a program for each row, or for tiles of rows."""
        count, depth = x.shape
        shape = self.shape
        tile = 1 if lone_rows else BLOCK
        _shrink[(triton.cdiv(count, tile), self._width // BLOCK, self._num_sums)](
            x,
            self._a,
            rows.slots,
            self._sums,
            count,
            depth,
            self._width,
            ROWS=tile,
            BLOCK=BLOCK,
            BK=BLOCK_K,
            SPLIT=SPLIT,
            num_warps=4,
            **CHAINED,
        )
        _expand[(triton.cdiv(count, tile), self._num_programs)](
            base,
            self._sums,
            self._b,
            rows.slots,
            self._starts,
            out,
            count,
            shape.out_features,
            self._width,
            R=shape.padded_rank,
            NUM_SUMS=self._num_sums,
            PARTS=len(shape.widths),
            BT=tile,
            BN=BLOCK_N,
            num_warps=4,
            **CHAINED,
        )
        return out
