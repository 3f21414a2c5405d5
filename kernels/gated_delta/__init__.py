"""Gated delta rule (Yang et al. 2024, arXiv 2412.06464): attention whose memory is a state of fixed size.

A row's channels (queries, keys, values) are each convolved with those of the rows before, then go through silu. In each
value head, with q and k of length 1 (q over sqrt(Dk)), decay = exp(rate * softplus(a + offset)) and b = sigmoid(beta):
    S = decay S;  S = S + k (b (v - S^T k))^T;  o = S^T q;  out = norm(o) * weight * silu(z)

Contract: rows of a request are computed one after the other, in order, from the state before the first one, whether
they are a prompt or were generated; so a row depends on its own request alone, and where a request is cut cannot be
seen. States are float32, never rounded in between. The convolution adds from the oldest input on, by fused
multiply-add. On a CPU sums over Dk are one chain of fused multiply-adds in ascending order, and those of squares are as
in `kernels.norms`; on a GPU they are trees whose shape depends on the dimensions alone, and what goes from kernel to
kernel is rounded to the dtype of activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.gated_delta.contract import DeltaHeads, DeltaWeights
from sempre.kernels.lazy_module import LazyModule
from sempre.kernels.states import LayerState, StateBatch

if TYPE_CHECKING:
    from sempre.kernels.gated_delta import cpu as _cpu
    from sempre.kernels.gated_delta import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["DeltaHeads", "DeltaWeights", "gated_delta"]


def gated_delta(
    rows: torch.Tensor,
    ba: torch.Tensor,
    weights: DeltaWeights,
    state: LayerState,
    batch: StateBatch,
    mixed: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """rows [T, C + V Dv] (channels, then z) and ba float32 [T, 2 V] (beta, then a) → out [T, V Dv].

    `mixed` [T, C] is scratch. Reads and writes the slots of `state` that `batch` names. IndexError on the CPU, before
    anything is written, for a slot that does not exist.
    """
    heads = weights.heads
    check_rows("gated_delta", rows, out)
    check_rows("gated_delta", ba, mixed)
    _check_shapes(rows, ba, mixed, out, heads)
    if batch.writes.shape[0] != rows.shape[0] or batch.query_starts.shape[0] != batch.reads.shape[0] + 1:
        sizes = tuple(array.shape[0] for array in (batch.reads, batch.writes, batch.query_starts))
        raise ValueError(f"gated_delta: reads, writes and query_starts of {sizes} do not fit {rows.shape[0]} rows")
    if not rows.shape[0]:
        return out
    if rows.is_cuda:
        return _gpu.gated_delta(rows, ba, weights, state, batch, mixed, out)
    if int(batch.query_starts[-1]) > rows.shape[0]:
        raise IndexError(f"gated_delta: requests end at row {int(batch.query_starts[-1])} of {rows.shape[0]}")
    num_slots = state.recurrent.shape[0]
    for name, slots in (("reads", batch.reads), ("writes", batch.writes)):
        low, high = (int(bound) for bound in slots.aminmax())
        if low < -1 or high >= num_slots:
            raise IndexError(f"gated_delta: {name} has slots from {low} to {high}, expected -1 to {num_slots - 1}")
    return _cpu.gated_delta(rows, ba, weights, state, batch, mixed, out)


def _check_shapes(
    rows: torch.Tensor, ba: torch.Tensor, mixed: torch.Tensor, out: torch.Tensor, heads: DeltaHeads
) -> None:
    count = out.shape[0]
    expected = {
        "rows": (rows, (count, heads.channels + heads.values)),
        "ba": (ba, (count, 2 * heads.num_value_heads)),
        "mixed": (mixed, (count, heads.channels)),
        "out": (out, (count, heads.values)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"gated_delta: {name} {tuple(tensor.shape)} does not fit {heads}: expected {shape}")
