"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): which experts compute a row, and the weighted sum of
their results.

Contract: a row's experts are those with its largest router logits, ties going to the lower expert; their weights are a
float32 softmax over all experts, divided by their own sum if renormalised; both sums have one order, whatever else is
in the batch. The results of a row's experts are multiplied by their weights, each product rounded to float32, and added
in rank order. So everything depends on the row alone. On a CPU an expert's rows are computed in the order of the
tokens; on a GPU `sparse_mlp` runs without waiting for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.lazy_module import LazyModule
from sempre.kernels.moe.experts import (
    ExpertRows,
    ExpertScratch,
    ExpertShape,
    ExpertWeights,
    GatedExperts,
    GroupedExperts,
    SigmoidScores,
    stack_like,
)

if TYPE_CHECKING:
    from sempre.kernels.moe import cpu as _cpu
    from sempre.kernels.moe import gpu as _gpu
    from sempre.kernels.moe import gpu_scores as _gpu_scores
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")
    _gpu_scores = LazyModule(__name__, "gpu_scores")

__all__ = [
    "ExpertRows",
    "ExpertScratch",
    "ExpertShape",
    "ExpertWeights",
    "GatedExperts",
    "GroupedExperts",
    "SigmoidScores",
    "add_shared",
    "combine",
    "expert_parts",
    "expert_scratch",
    "route",
    "scale_weights",
    "sparse_mlp",
    "stack_like",
]


def route(
    logits: torch.Tensor, num_chosen: int, *, renormalize: bool, scores: SigmoidScores | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits float32 [T, E] → experts int64 [T, K] in rank order, and their weights float32 [T, K]; on a CPU.

    A row with NaN or infinity among its logits has weights of NaN. ValueError for a `num_chosen` outside [1, E], or
    more than the kept groups have.
    """
    check_rows("route", logits, logits)
    most = logits.shape[1] if scores is None else logits.shape[1] // scores.num_groups * scores.kept_groups
    if not 1 <= num_chosen <= most:
        raise ValueError(f"route: expected 1 to {most} experts a row, found {num_chosen}")
    experts = torch.empty(logits.shape[0], num_chosen, dtype=torch.int64, device=logits.device)
    weights = torch.empty(experts.shape, dtype=torch.float32, device=logits.device)
    if not logits.shape[0]:
        return experts, weights
    return _cpu.route(logits, experts, weights, renormalize=renormalize, scores=scores)


def scale_weights(weights: torch.Tensor, experts: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """weights[t, k] *= factors[experts[t, k]], in place; weights and experts [T, K], factors float32 [E]; on a CPU."""
    return weights.mul_(factors.index_select(0, experts.reshape(-1)).view(weights.shape))


def add_shared(out: torch.Tensor, shared: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """out[t] += sigmoid(gate[t]) * shared[t], or without a factor; out and shared [T, H], gate float32 [T, 1].

    The product is rounded to float32, the sum to the dtype of `out`.
    """
    check_rows("add_shared", shared, out)
    if shared.shape != out.shape or (gate is not None and gate.shape != (out.shape[0], 1)):
        raise ValueError(f"add_shared: shared {tuple(shared.shape)} or its gate do not fit out {tuple(out.shape)}")
    if not out.shape[0]:
        return out
    if not out.is_cuda:
        return _cpu.add_shared(out, shared, gate)
    return _gpu_scores.add_shared(out, shared, gate)


def combine(parts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * parts[t, k]; parts [T, K, H] and weights [T, K] float32, out [T, H]."""
    check_rows("combine", parts, out)
    check_rows("combine", weights, out)
    if parts.shape != (*weights.shape, out.shape[1]) or out.shape[0] != parts.shape[0]:
        raise ValueError(
            f"combine: weights {tuple(weights.shape)} and out {tuple(out.shape)} do not fit parts {tuple(parts.shape)}"
        )
    if not out.shape[0]:
        return out
    if not parts.is_cuda:
        return _cpu.combine(parts, weights, out)
    return _gpu.combine(parts, weights, out)


def expert_parts(
    x: torch.Tensor, experts: torch.Tensor, weights: GroupedExperts, scratch: ExpertRows, parts: torch.Tensor
) -> torch.Tensor:
    """x float32 [T, H] and experts int64 [T, K] → parts float32 [T, K, H]: the branch of each expert for its row.

    On a CPU. Parts of experts that are not among `weights` stay as they are.
    """
    check_rows("expert_parts", x, parts)
    pairs = experts.numel()
    if parts.shape != (*experts.shape, x.shape[1]) or min(len(rows) for rows in scratch) < pairs:
        raise ValueError(
            f"expert_parts: x {tuple(x.shape)}, parts {tuple(parts.shape)} and scratch of {len(scratch.activated)} rows"
            f" do not fit experts {tuple(experts.shape)}"
        )
    return _cpu.expert_parts(x, experts, weights, scratch, parts)


def sparse_mlp(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: GatedExperts,
    scratch: ExpertScratch,
    out: torch.Tensor,
    *,
    renormalize: bool,
    scores: SigmoidScores | None = None,
) -> torch.Tensor:
    """x [T, H] and the router's logits float32 [T, E] → out [T, H], on a GPU: the experts' branches, combined."""
    check_rows("sparse_mlp", x, out)
    check_rows("sparse_mlp", logits, out)
    if experts.gate_up.num_experts != logits.shape[1]:
        raise ValueError(f"sparse_mlp: logits {tuple(logits.shape)} do not fit {experts.gate_up.num_experts} experts")
    if not x.shape[0]:
        return out
    return _gpu.sparse_mlp(x, logits, experts, scratch, out, renormalize=renormalize, scores=scores)


def expert_scratch(
    allocate: Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor],
    shape: ExpertShape,
    max_rows: int,
    dtype: torch.dtype,
) -> ExpertScratch:
    """What `sparse_mlp` needs for at most `max_rows` rows of `dtype`; `allocate` gets a role, a shape and a dtype.

    ValueError for more experts, or more of them per row, than the kernels support.
    """
    return _gpu.expert_scratch(allocate, shape, max_rows, dtype)
