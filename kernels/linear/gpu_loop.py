"""The loop over K of every Triton product."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit


@jit()
def accumulate(
    w: Any,
    x: Any,
    n: Any,
    t: Any,
    K: Any,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTED: tl.constexpr,
) -> Any:
    """acc[n, t] = sum over ascending k of w[n, k] x[t, k]; a weight of another dtype is widened to that of x.

    PROMOTED: 0, or for fp8 operands the elements of K after which their sum goes to the float32 accumulator.
    """
    k = tl.arange(0, BK)
    w_at = w + n.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + t.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros([BN, BT], tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            w_tile = tl.load(w_at)
            x_tile = tl.load(x_at)
        else:
            inside = start + k < K
            w_tile = tl.load(w_at, mask=inside[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
        if PROMOTED > 0:
            acc = tl.dot(w_tile, x_tile, acc, max_num_imprecise_acc=PROMOTED)
        else:
            acc = tl.dot(w_tile.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
        w_at += BK
        x_at += BK
    return acc
