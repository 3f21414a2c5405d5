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

import torch

from sempre.kernels.checks import check_rows
from sempre.kernels.moe.experts import ExpertScratch, ExpertShape, ExpertWeights, GatedExperts, stack_like

__all__ = [
    "ExpertScratch",
    "ExpertShape",
    "ExpertWeights",
    "GatedExperts",
    "combine",
    "expert_scratch",
    "route",
    "sparse_mlp",
    "stack_like",
]


def route(logits: torch.Tensor, num_chosen: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits float32 [T, E] → experts int64 [T, K] in rank order, and their weights float32 [T, K]; on a CPU.

    A row with NaN or infinity among its logits has weights of NaN. ValueError for a `num_chosen` outside [1, E].
    """
    check_rows("route", logits, logits)
    if not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"route: expected 1 to {logits.shape[1]} experts a row, found {num_chosen}")
    experts = torch.empty(logits.shape[0], num_chosen, dtype=torch.int64, device=logits.device)
    weights = torch.empty(experts.shape, dtype=torch.float32, device=logits.device)
    if not logits.shape[0]:
        return experts, weights
    from sempre.kernels.moe import cpu

    return cpu.route(logits, experts, weights, renormalize=renormalize)


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
        from sempre.kernels.moe import cpu

        return cpu.combine(parts, weights, out)
    from sempre.kernels.moe import gpu

    return gpu.combine(parts, weights, out)


def sparse_mlp(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: GatedExperts,
    scratch: ExpertScratch,
    out: torch.Tensor,
    *,
    renormalize: bool,
) -> torch.Tensor:
    """x [T, H] and the router's logits float32 [T, E] → out [T, H], on a GPU: the experts' branches, combined."""
    check_rows("sparse_mlp", x, out)
    check_rows("sparse_mlp", logits, out)
    if experts.gate_up.num_experts != logits.shape[1]:
        raise ValueError(f"sparse_mlp: logits {tuple(logits.shape)} do not fit {experts.gate_up.num_experts} experts")
    if not x.shape[0]:
        return out
    from sempre.kernels.moe import gpu

    return gpu.sparse_mlp(x, logits, experts, scratch, out, renormalize=renormalize)


def expert_scratch(
    allocate: Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor],
    shape: ExpertShape,
    max_rows: int,
    dtype: torch.dtype,
) -> ExpertScratch:
    """What `sparse_mlp` needs for at most `max_rows` rows of `dtype`; `allocate` gets a role, a shape and a dtype.

    ValueError for more experts, or more of them per row, than the kernels support.
    """
    from sempre.kernels.moe import gpu

    return gpu.expert_scratch(allocate, shape, max_rows, dtype)
