"""The documented order of a matmul on a CPU, one term at a time."""

from __future__ import annotations

import numpy as np
from sampling_reference import fma

CHAIN = 64


def product_in_order(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [T, K] times weight [N, K]: chains of fused multiply-adds, which are added in order; float32 [T, N]."""
    total: np.ndarray | None = None
    for start in range(0, x.shape[1], CHAIN):
        chain = np.zeros((x.shape[0], weight.shape[0]), np.float32)
        for k in range(start, min(start + CHAIN, x.shape[1])):
            chain = fma(x[:, k : k + 1], weight[:, k], chain)
        total = chain if total is None else total + chain
    assert total is not None
    return total
