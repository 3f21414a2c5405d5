"""CPU router and combine. T rows, E experts, K experts a row, H width."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange

from sempre.kernels.jit import compiled, compiled_twice
from sempre.kernels.sampling.elementary import exp32

PARALLEL_ELEMENTS = 16_384

_ZERO, _NAN = np.float32(0.0), np.float32(np.nan)
_INFINITY = np.float32(np.inf)


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


def route(
    logits: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into experts int64 [T, K] and weights float32 [T, K]; returns both."""
    _route(logits.numpy(), renormalize, experts.numpy(), weights.numpy())
    return experts, weights


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
