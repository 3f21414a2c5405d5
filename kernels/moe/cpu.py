"""CPU router, experts and combine. T rows, E experts, K experts a row, H width."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange

from sempre.kernels.jit import compiled, compiled_twice
from sempre.kernels.linear import GroupRows, group_linear
from sempre.kernels.moe.experts import ExpertRows, GroupedExperts, SigmoidScores
from sempre.kernels.sampling.elementary import exp32, sigmoid32

PARALLEL_ELEMENTS = 16_384

_ZERO, _NAN = np.float32(0.0), np.float32(np.nan)
_INFINITY = np.float32(np.inf)
_NO_GATE = np.empty((0, 1), np.float32)
_ONE, _TINY = np.float32(1.0), np.float32(1e-20)


@compiled()
def _route(logits: Any, renormalize: bool, experts: Any, weights: Any) -> None:
    for t in range(logits.shape[0]):
        row = logits[t]
        taken = np.zeros(row.size, np.bool_)
        for k in range(experts.shape[1]):
            best = -1
            for e in range(row.size):
                if not taken[e] and (best < 0 or row[e] > row[best]):
                    best = e
            taken[best] = True
            experts[t, k] = best
        maximum, total = row[experts[t, 0]], _ZERO
        finite = True
        for e in range(row.size):
            finite &= -_INFINITY < row[e] < _INFINITY
            total += exp32(row[e] - maximum)
        chosen = _ZERO
        for k in range(experts.shape[1]):
            weights[t, k] = exp32(row[experts[t, k]] - maximum) / total if finite else _NAN
            chosen += weights[t, k]
        if renormalize:
            for k in range(experts.shape[1]):
                weights[t, k] /= chosen


@compiled()
def _greatest(values: Any, taken: Any) -> int:
    """The index of the greatest that is not taken, of equal ones the lower."""
    best = -1
    for i in range(values.size):
        if not taken[i] and (best < 0 or values[i] > values[best]):
            best = i
    return best


@compiled()
def _close_groups(wanted: Any, num_groups: int, kept_groups: int, taken: Any) -> None:
    """Mark the experts of all but the best groups as taken."""
    size = wanted.size // num_groups
    totals = np.empty(num_groups, np.float32)
    closed = np.ones(num_groups, np.bool_)
    for g in range(num_groups):
        first, second = -_INFINITY, -_INFINITY
        for e in range(g * size, (g + 1) * size):
            if wanted[e] > first:
                first, second = wanted[e], first
            elif wanted[e] > second:
                second = wanted[e]
        totals[g] = first + second
    for _ in range(kept_groups):
        closed[_greatest(totals, ~closed)] = False
    for e in range(wanted.size):
        taken[e] = closed[e // size]


@compiled()
def _route_sigmoid(
    logits: Any,
    bias: Any,
    num_groups: int,
    kept_groups: int,
    scale: Any,
    renormalize: bool,
    experts: Any,
    weights: Any,
) -> None:
    for t in range(logits.shape[0]):
        row = logits[t]
        scores, wanted = np.empty(row.size, np.float32), np.empty(row.size, np.float32)
        finite = True
        for e in range(row.size):
            finite &= -_INFINITY < row[e] < _INFINITY
            scores[e] = sigmoid32(row[e])
            wanted[e] = scores[e] + bias[e]
        taken = np.zeros(row.size, np.bool_)
        if kept_groups < num_groups:
            _close_groups(wanted, num_groups, kept_groups, taken)
        total = _ZERO
        for k in range(experts.shape[1]):
            experts[t, k] = _greatest(wanted, taken)
            taken[experts[t, k]] = True
            weights[t, k] = scores[experts[t, k]]
            total += weights[t, k]
        for k in range(experts.shape[1]):
            if renormalize:
                weights[t, k] /= total + _TINY
            weights[t, k] = weights[t, k] * scale if finite else _NAN


def route(
    logits: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    *,
    renormalize: bool,
    scores: SigmoidScores | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into experts int64 [T, K] and weights float32 [T, K]; returns both."""
    into = experts.numpy(), weights.numpy()
    if scores is None:
        _route(logits.numpy(), renormalize, *into)
    else:
        groups = scores.num_groups, scores.kept_groups
        _route_sigmoid(logits.numpy(), scores.bias.numpy(), *groups, np.float32(scores.scale), renormalize, *into)
    return experts, weights


@compiled()
def _sort_pairs(experts: Any, first: int, starts: Any, tokens: Any, pairs: Any) -> None:
    """A stable counting sort of pairs by their experts, of which there are starts.size - 1 from `first` on; others are
    left out."""
    rows, chosen = experts.shape
    count = starts.size - 1
    starts[:] = 0
    for t in range(rows):
        for k in range(chosen):
            g = experts[t, k] - first
            if 0 <= g < count:
                starts[g + 1] += 1
    for g in range(count):
        starts[g + 1] += starts[g]
    places = starts[:-1].copy()
    for t in range(rows):
        for k in range(chosen):
            g = experts[t, k] - first
            if 0 <= g < count:
                tokens[places[g]] = t
                pairs[places[g]] = t * chosen + k
                places[g] += 1


def expert_parts(
    x: torch.Tensor, experts: torch.Tensor, weights: GroupedExperts, scratch: ExpertRows, parts: torch.Tensor
) -> torch.Tensor:
    """See the facade."""
    most = experts.numel()
    starts = np.empty(len(weights.down.weights) + 1, np.int64)
    tokens, pairs, in_order = np.empty(most, np.int64), np.empty(most, np.int64), np.arange(most)
    _sort_pairs(experts.numpy(), weights.first, starts, tokens, pairs)
    count = int(starts[-1])
    gate_up, activated = scratch.gate_up[:count], scratch.activated[:count]
    group_linear(x, weights.gate_up, GroupRows(starts, tokens, in_order), gate_up)
    weights.activation.and_mul(gate_up, activated)
    group_linear(activated, weights.down, GroupRows(starts, in_order, pairs), parts.view(most, x.shape[1]))
    return parts


@compiled_twice
def _combine(parts: Any, weights: Any, out: Any) -> None:
    for t in prange(out.shape[0]):
        for h in range(out.shape[1]):
            out[t, h] = weights[t, 0] * parts[t, 0, h]
        for k in range(1, weights.shape[1]):
            for h in range(out.shape[1]):
                out[t, h] += weights[t, k] * parts[t, k, h]


def combine(parts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    run = _combine.parallel if parts.numel() >= PARALLEL_ELEMENTS else _combine.serial
    run(parts.numpy(), weights.numpy(), out.numpy())
    return out


@compiled_twice
def _add_shared(out: Any, shared: Any, gate: Any) -> None:
    for t in prange(out.shape[0]):
        factor = sigmoid32(gate[t, 0]) if gate.shape[0] else _ONE
        for h in range(out.shape[1]):
            out[t, h] += factor * shared[t, h]


def add_shared(out: torch.Tensor, shared: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """As the facade."""
    run = _add_shared.parallel if out.numel() >= PARALLEL_ELEMENTS else _add_shared.serial
    run(out.numpy(), shared.numpy(), gate.numpy() if gate is not None else _NO_GATE)
    return out
