"""GPU routing by sigmoid scores, around the router that sorts, factors of weights, and the sum with a shared expert.

# T rows, E experts, K experts a row, H width
A program owns one row, or a part of it. `preferences` are what `dispatch` takes for logits: it chooses the greatest;
`weigh` then replaces its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.moe.experts import ExpertScratch, SigmoidScores
from sempre.kernels.sampling.gpu_elementary import sigmoid32

ADDED = 1024

_TINY = tl.constexpr(1e-20)
# finite, so that a row of these is not taken for one that cannot be computed
_CLOSED = tl.constexpr(-3e38)


@jit()
def _preferences(
    logits: Any,
    bias: Any,
    out: Any,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    correction = tl.load(bias + e, mask=inside, other=0.0)
    wait_for_previous()
    at = tl.program_id(0).to(tl.int64) * E + e
    logit = tl.load(logits + at, mask=inside, other=0.0)
    wanted = tl.where(inside, sigmoid32(logit) + correction, float("-inf"))
    if KEPT < GROUPS:
        group = e // (E // GROUPS)
        totals = tl.full([BLOCK_E], float("-inf"), tl.float32)
        for g in range(GROUPS):
            own = tl.where(group == g, wanted, float("-inf"))
            first = tl.max(own, axis=0)
            best = tl.min(tl.where(own == first, e, BLOCK_E), axis=0)
            totals = tl.where(group == g, first + tl.max(tl.where(e == best, float("-inf"), own), axis=0), totals)
        left = tl.where(inside, totals, float("-inf"))
        for _ in range(KEPT):
            kept = tl.min(tl.where(left == tl.max(left, axis=0), group, BLOCK_E), axis=0)
            left = tl.where(group == kept, float("-inf"), left)
        wanted = tl.where(left == float("-inf"), wanted, _CLOSED)
    tl.store(out + at, tl.where(tl.abs(logit) < float("inf"), wanted, float("nan")), mask=inside)


@jit(runtime=("scale",))
def _weigh(
    logits: Any,
    experts: Any,
    weights: Any,
    scale: Any,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)
    at, inside = row * K + rank, rank < K
    expert = tl.load(experts + at, mask=inside, other=0)
    score = tl.where(inside, sigmoid32(tl.load(logits + row * E + expert)), 0.0)
    before = tl.load(weights + at, mask=inside, other=0.0)
    if RENORMALIZE:
        score = tl.div_rn(score, tl.zeros_like(score) + (tl.sum(score, axis=0) + _TINY))
    # NaN stands for a row that cannot be computed
    tl.store(weights + at, tl.where(before == before, score * scale, float("nan")), mask=inside)


@jit()
def _scale_weights(experts: Any, weights: Any, factors: Any, K: tl.constexpr, BLOCK_K: tl.constexpr) -> None:
    wait_for_previous()
    rank = tl.arange(0, BLOCK_K)
    at, inside = tl.program_id(0).to(tl.int64) * K + rank, rank < K
    factor = tl.load(factors + tl.load(experts + at, mask=inside, other=0), mask=inside, other=0.0)
    tl.store(weights + at, tl.load(weights + at, mask=inside, other=0.0) * factor, mask=inside)


@jit(runtime=("width",))
def _add_shared(out: Any, shared: Any, gate: Any, width: Any, GATED: tl.constexpr, BLOCK: tl.constexpr) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * width + h, h < width
    value = tl.load(shared + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value *= sigmoid32(tl.load(gate + row))
    tl.store(out + at, tl.load(out + at, mask=inside, other=0.0).to(tl.float32) + value, mask=inside)


def preferences(logits: torch.Tensor, scores: SigmoidScores) -> torch.Tensor:
    """Of experts [T, E]: scores with their bias; what no row may choose is far below."""
    rows, num_experts = logits.shape
    out = torch.empty_like(logits)
    _preferences[(rows,)](
        logits,
        scores.bias,
        out,
        E=num_experts,
        GROUPS=scores.num_groups,
        KEPT=scores.kept_groups,
        BLOCK_E=triton.next_power_of_2(num_experts),
        num_warps=1,
        **CHAINED,
    )
    return out


def weigh(logits: torch.Tensor, scratch: ExpertScratch, scores: SigmoidScores, *, renormalize: bool) -> None:
    """Replace the weights of the chosen experts."""
    rows, num_experts = logits.shape
    num_chosen = scratch.experts.shape[1]
    _weigh[(rows,)](
        logits,
        scratch.experts,
        scratch.weights,
        scores.scale,
        E=num_experts,
        K=num_chosen,
        BLOCK_K=triton.next_power_of_2(num_chosen),
        RENORMALIZE=renormalize,
        num_warps=1,
        **CHAINED,
    )


def scale_weights(scratch: ExpertScratch, rows: int, factors: torch.Tensor) -> None:
    """Multiply the weights of the chosen experts by the experts' factors, float32 [E].

    A kernel, since PyTorch would look for experts that no kernel has written while kernels are only collected.
    """
    num_chosen = scratch.experts.shape[1]
    _scale_weights[(rows,)](
        scratch.experts,
        scratch.weights,
        factors,
        K=num_chosen,
        BLOCK_K=triton.next_power_of_2(num_chosen),
        num_warps=1,
        **CHAINED,
    )


def add_shared(out: torch.Tensor, shared: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """As the facade."""
    rows, width = out.shape
    grid = (rows, triton.cdiv(width, ADDED))
    _add_shared[grid](out, shared, gate, width, GATED=gate is not None, BLOCK=ADDED, num_warps=4, **CHAINED)
    return out
