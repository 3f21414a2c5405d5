"""Ranks on GPUs: meetings, and the sums and moves of rows that lie in each other's memory. T rows, N columns.

A rank's memory begins with FLAG_BYTES of flags, zero at first: one word for each place and rank. Program p of a kernel
uses place p. It counts the meetings of its place in memory of its own device, so that graphs can be replayed, tells
every other rank the number, and waits until all have told it theirs. All ranks launch the same kernels with the same
grids in the same order. The number of a place is told after everything that earlier kernels of the rank have written,
and a rank that has met the others in one kernel knows that they are past all kernels before.

Nobody is waited for longer than `patience` looks: then `failure` gets the rank that is missing, counted from 1, all
later meetings are over at once, and results mean nothing.

Partial sums are added as a balanced binary tree over the ranks, in their order, whichever rank adds them. So it does
not matter whether each rank adds all rows, or each adds its share and gives the others the rounded results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from sempre.kernels.exchange.contract import Cut, Norm
from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.linear.weights import GpuLinearWeight
from sempre.kernels.norms.gpu import normalised, row_shape

# programs of a kernel that meets: they must all be on the device at once, and leave room for the kernel before
PLACES = 256
FLAG_BYTES = 64 << 10
# looks at a flag before the rank also looks whether another meeting has failed
_QUICK_LOOKS = tl.constexpr(4096)
# where counts have the word that says so
_FAILED = tl.constexpr(PLACES)
_COLUMNS = 2048


@dataclass(frozen=True)
class Peers:
    """The ranks of a replica, as the kernels of one of them see them."""

    rank: int
    bases: torch.Tensor
    """int64 [ranks]: the address of each rank's memory"""
    counts: torch.Tensor
    """int32 [PLACES + 1], zero at first: meetings of each place, and whether one has failed"""
    failure: torch.Tensor
    """int32 [1], readable by the host; zero at first"""
    patience: int
    """looks, below 2**30"""

    @property
    def size(self) -> int:
        return int(self.bases.shape[0])


@jit()
def _words(bases: Any, rank: Any) -> Any:
    return tl.load(bases + rank).to(tl.pointer_type(tl.int32))


@jit()
def _area(bases: Any, rank: Any, start: Any, kind: tl.constexpr) -> Any:
    """Where the area that starts at byte `start` of a rank's memory is."""
    return tl.multiple_of((tl.load(bases + rank) + start).to(tl.pointer_type(kind)), 16)


@jit()
def _meet(bases: Any, counts: Any, failure: Any, patience: Any, RANK: tl.constexpr, RANKS: tl.constexpr) -> None:
    """Tell the others that this program has come, and wait for theirs."""
    place = tl.program_id(0)
    # atomics are done once and their results are given to all threads, which must agree on when to stop
    number = tl.atomic_add(counts + place, 1, sem="relaxed") + 1
    for other in tl.static_range(RANKS):
        if other != RANK:
            told = _words(bases, other) + place * RANKS + RANK
            tl.atomic_xchg(told, number, sem="release", scope="sys")
    for other in tl.static_range(RANKS):
        if other != RANK:
            flag = _words(bases, RANK) + place * RANKS + other
            # the difference, since numbers start again after 2**32
            missing = number - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            looks = 0
            while (missing > 0) & (looks < _QUICK_LOOKS) & (looks < patience):
                missing = number - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                looks += 1
            while (missing > 0) & (looks < patience):
                looks += 1 + tl.atomic_add(counts + _FAILED, 0, sem="relaxed") * patience
                missing = number - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            if missing > 0:
                tl.atomic_xchg(counts + _FAILED, 1, sem="relaxed")
                tl.store(failure, other + 1)


@jit(runtime=("patience",))
def _only_meet(bases: Any, counts: Any, failure: Any, patience: Any, RANK: tl.constexpr, RANKS: tl.constexpr) -> None:
    wait_for_previous()
    _meet(bases, counts, failure, patience, RANK, RANKS)


@jit()
def _partial(bases: Any, rank: Any, start: Any, at: Any, inside: Any) -> Any:
    # not from a cache that other GPUs' writes do not reach
    return tl.load(_area(bases, rank, start, tl.float32) + at, mask=inside, other=0.0, cache_modifier=".cg")


@jit()
def _tree(bases: Any, start: Any, at: Any, inside: Any, RANKS: tl.constexpr) -> Any:
    total = _partial(bases, 0, start, at, inside) + _partial(bases, 1, start, at, inside)
    if RANKS > 2:
        total += _partial(bases, 2, start, at, inside) + _partial(bases, 3, start, at, inside)
    if RANKS > 4:
        four = _partial(bases, 4, start, at, inside) + _partial(bases, 5, start, at, inside)
        four += _partial(bases, 6, start, at, inside) + _partial(bases, 7, start, at, inside)
        total += four
    return total


@jit()
def _finished(
    bases: Any, start: Any, scale: Any, bias: Any, at: Any, i: Any, inside: Any, RANKS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> Any:  # fmt: skip
    """The tree, * scale, + bias, if there."""
    total = _tree(bases, start, at, inside, RANKS)
    if HAS_SCALE:
        total *= tl.load(scale + i, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    return total


@jit(runtime=("T", "start", "width", "eps", "patience"))
def _sum(
    bases: Any, counts: Any, failure: Any, start: Any, scale: Any, bias: Any, residual: Any, weight: Any, out: Any,
    T: Any, N: Any, width: Any, eps: Any, patience: Any,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, IS_SUMMED: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMS: tl.constexpr,
) -> None:  # fmt: skip
    """out[t] = the sum over ranks of their rows t, rounded; with NORMS as `add_rms_norm` has it. IS_SUMMED: this rank's
    memory has the rounded sums already. `width` is N again, as in the kernels of `norms`, whose order of additions
    must be the same."""
    i = tl.arange(0, BLOCK)
    inside = i < N
    wait_for_previous()
    _meet(bases, counts, failure, patience, RANK, RANKS)
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        at = tl.cast(t, tl.int64) * N + i
        if IS_SUMMED:
            summed = _area(bases, RANK, start, out.dtype.element_ty)
            value = tl.load(summed + at, mask=inside, other=0.0, cache_modifier=".cg")
        else:
            value = _finished(bases, start, scale, bias, at, i, inside, RANKS, HAS_SCALE, HAS_BIAS)
            value = value.to(out.dtype.element_ty)
        if NORMS:
            total = value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(residual + at, total.to(residual.dtype.element_ty), mask=inside)
            # read again as `norms` reads it, so that the elements lie on the same threads
            tl.debug_barrier()
            row = tl.cast(t, tl.int64) * width
            j = tl.arange(0, BLOCK)
            w = tl.load(weight + j, mask=j < width, other=0.0)
            again = tl.load(residual + row + j, mask=j < width, other=0.0).to(tl.float32)
            tl.store(out + row + j, normalised(again, w, width, eps), mask=j < width)
        else:
            tl.store(out + at, value, mask=inside)


@jit(runtime=("first", "last", "start", "results", "patience"))
def _sum_and_give(
    bases: Any, counts: Any, failure: Any, start: Any, results: Any, scale: Any, bias: Any, first: Any, last: Any,
    N: Any, patience: Any,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """The sums of rows [first, last), rounded to KIND, into every rank's area `results`."""
    i = tl.arange(0, BLOCK)
    inside = i < N
    wait_for_previous()
    _meet(bases, counts, failure, patience, RANK, RANKS)
    for t in range(first + tl.program_id(0), last, tl.num_programs(0)):
        at = tl.cast(t, tl.int64) * N + i
        value = _finished(bases, start, scale, bias, at, i, inside, RANKS, HAS_SCALE, HAS_BIAS).to(KIND)
        for rank in tl.static_range(RANKS):
            tl.store(_area(bases, rank, results, KIND) + at, value, mask=inside)


@jit(runtime=("T", "start", "count", "each", "more", "patience"))
def _gather_rows(
    bases: Any, counts: Any, failure: Any, start: Any, token_ids: Any, out: Any, T: Any, N: Any, count: Any,
    each: Any, more: Any, patience: Any, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """out[t] = row t of the rank that has the table's row token_ids[t]; NaN for an id outside the table."""
    i = tl.arange(0, BLOCK)
    inside = i < N
    wait_for_previous()
    _meet(bases, counts, failure, patience, RANK, RANKS)
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        at = tl.cast(t, tl.int64) * N + i
        token = tl.load(token_ids + t)
        known = (token >= 0) & (token < count)
        larger = more * (each + 1)
        beyond = more + (token - larger) // tl.maximum(each, 1)
        owner = tl.where(token < larger, token // (each + 1), beyond)
        rows = _area(bases, tl.where(known, owner, 0), start, out.dtype.element_ty)
        value = tl.load(rows + at, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(out + at, tl.where(known, value, float("nan")), mask=inside)


@jit(runtime=("T", "start", "count", "each", "more", "patience"))
def _gather_columns(
    bases: Any, counts: Any, failure: Any, start: Any, out: Any, T: Any, count: Any, each: Any, more: Any,
    patience: Any, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """out [T, count] float32: the ranks' columns side by side, each rank's rows [T, its columns]."""
    wait_for_previous()
    _meet(bases, counts, failure, patience, RANK, RANKS)
    pieces = tl.cdiv(each + 1, BLOCK)
    for index in range(tl.program_id(0), T * RANKS * pieces, tl.num_programs(0)):
        i = index % pieces * BLOCK + tl.arange(0, BLOCK)
        rank = index // pieces % RANKS
        t = tl.cast(index // pieces // RANKS, tl.int64)
        own = each + (rank < more).to(tl.int32)
        inside = i < own
        value = tl.load(
            _area(bases, rank, start, tl.float32) + t * own + i, mask=inside, other=0.0, cache_modifier=".cg"
        )
        tl.store(out + t * count + rank * each + tl.minimum(rank, more) + i, value, mask=inside)


def meet(peers: Peers) -> None:
    """Wait until the other ranks have done all that they were to do before."""
    _only_meet[(1,)](*_ranks(peers), peers.patience, RANK=peers.rank, RANKS=peers.size, num_warps=1, **CHAINED)


def sum_rows(peers: Peers, start: int, w: GpuLinearWeight, out: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
    """Add the float32 rows [T, N] at byte `start` of each rank's memory; * w.scale, + w.bias, rounded to out [T, N].

    With `norm`, that is added to the residual instead, and `out` gets the norm: the bits of `add_rms_norm`.
    """
    return _launch_sum(peers, start, w, out, norm, is_summed=False)


def sum_shares(
    peers: Peers, start: int, results: int, w: GpuLinearWeight, out: torch.Tensor, norm: Norm | None = None
) -> torch.Tensor:
    """The same bits for many rows: a rank adds its share of them, and gives the others the results in the area
    `results` of their memory."""
    rows, width = out.shape
    first, last = peers.rank * rows // peers.size, (peers.rank + 1) * rows // peers.size
    block, warps = row_shape(width)
    _sum_and_give[(min(PLACES, -(-rows // peers.size)),)](
        *_ranks(peers), start, results, w.scale, w.bias, first, last, width, peers.patience,
        RANK=peers.rank, RANKS=peers.size, BLOCK=block, KIND=_KINDS[out.dtype], HAS_SCALE=w.scale is not None,
        HAS_BIAS=w.bias is not None, num_warps=warps, **CHAINED,
    )  # fmt: skip
    return _launch_sum(peers, results, w, out, norm, is_summed=True)


_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _launch_sum(
    peers: Peers, start: int, w: GpuLinearWeight, out: torch.Tensor, norm: Norm | None, *, is_summed: bool
) -> torch.Tensor:
    rows, width = out.shape
    block, warps = row_shape(width)
    residual, weight, eps = (out, out, 0.0) if norm is None else norm
    _sum[(min(PLACES, rows),)](
        *_ranks(peers), start, w.scale, w.bias, residual, weight, out, rows, width, width, eps, peers.patience,
        RANK=peers.rank, RANKS=peers.size, BLOCK=block, IS_SUMMED=is_summed,
        HAS_SCALE=w.scale is not None and not is_summed, HAS_BIAS=w.bias is not None and not is_summed,
        NORMS=norm is not None, num_warps=warps, **CHAINED,
    )  # fmt: skip
    return out


def gather_rows(peers: Peers, start: int, token_ids: torch.Tensor, cut: Cut, out: torch.Tensor) -> torch.Tensor:
    """out [T, N]: row t from byte `start` of the memory of the rank that has row token_ids[t] of a table; NaN for an id
    outside the table. The rows there have out's dtype."""
    rows, width = out.shape
    block, warps = row_shape(width)
    _gather_rows[(min(PLACES, rows),)](
        *_ranks(peers), start, token_ids, out, rows, width, *cut, peers.patience,
        RANK=peers.rank, RANKS=peers.size, BLOCK=block, num_warps=warps, **CHAINED,
    )  # fmt: skip
    return out


def gather_columns(peers: Peers, start: int, cut: Cut, out: torch.Tensor) -> torch.Tensor:
    """out float32 [T, count]: the columns of all ranks, whose rows begin at byte `start` of their memory."""
    tiles = out.shape[0] * peers.size * -(-(cut.each + 1) // _COLUMNS)
    _gather_columns[(min(PLACES, tiles),)](
        *_ranks(peers), start, out, out.shape[0], *cut, peers.patience,
        RANK=peers.rank, RANKS=peers.size, BLOCK=_COLUMNS, num_warps=4, **CHAINED,
    )  # fmt: skip
    return out


def _ranks(peers: Peers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return peers.bases, peers.counts, peers.failure
