"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): who computes a row, and the sum of what they say.

Contract: a row's experts are those of its greatest router logits, of equal ones the lower; their weights are float32
softmax over all experts, summed in ascending order of experts, and divided by their own sum, in rank order, where they
are renormalised. The results of a row's experts are multiplied by their weights, each product rounded, and added in
rank order. So both depend on the row alone. CPU only.
"""

from __future__ import annotations

import torch

from sempre.kernels.checks import check_rows

__all__ = ["combine", "route"]


def route(logits: torch.Tensor, num_chosen: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits float32 [T, E] → experts int64 [T, K] in rank order, and their weights float32 [T, K].

    A row with NaN or infinity among its logits has weights of NaN. ValueError for a `num_chosen` outside [1, E].
    """
    check_rows("route", logits, logits)
    if not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"route: expected 1 to {logits.shape[1]} experts a row, found {num_chosen}")
    from sempre.kernels.moe import cpu

    return cpu.route(logits, num_chosen, renormalize=renormalize)


def combine(parts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * parts[t, k]; parts [T, K, H], weights [T, K], out [T, H]."""
    check_rows("combine", parts.view(parts.shape[0], -1), out)
    check_rows("combine", weights, out)
    if parts.shape != (*weights.shape, out.shape[1]) or out.shape[0] != parts.shape[0]:
        raise ValueError(
            f"combine: weights {tuple(weights.shape)} and out {tuple(out.shape)} do not fit parts {tuple(parts.shape)}"
        )
    from sempre.kernels.moe import cpu

    return cpu.combine(parts, weights, out)
