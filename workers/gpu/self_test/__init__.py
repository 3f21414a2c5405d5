"""Start-up self-test on a GPU: for this model's shapes, each kernel that may be chosen gives the reference's bits.

A matmul kernel that disagrees is left out of the choice for its weight; the fingerprint names it. Anything else that
disagrees with itself raises InvarianceError, and the worker does not serve. Nothing here draws from the global
generators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sempre.kernels.attention import AttentionWorkspace
from sempre.workers.gpu.self_test.experts import check_experts
from sempre.workers.gpu.self_test.linears import check_linears, require_fp8
from sempre.workers.gpu.self_test.sampling import check_sampling
from sempre.workers.loading import WeightFacts
from sempre.workers.models.base import CausalLM
from sempre.workers.self_test import Comparison, check_model

__all__ = ["SelfTest", "require_fp8", "run_self_test"]


class SelfTest(NamedTuple):
    """The findings; `require_equal` judges the comparisons."""

    excluded: dict[str, list[str]]
    """matmul kernels that disagree, by shape, for the fingerprint"""
    comparisons: list[Comparison]


def run_self_test(
    model: CausalLM,
    facts: WeightFacts,
    workspace: AttentionWorkspace,
    *,
    block_size: int,
    max_tokens: int,
    max_num_seqs: int,
) -> SelfTest:
    """The model, and sampling if it samples; its matmuls lose the kernels that disagree. A step has at most
    `max_tokens` tokens."""
    linears = check_linears(model, facts.dtype, max_tokens=max_tokens, max_num_seqs=max_num_seqs)
    comparisons = [
        *linears.reference,
        *check_experts(model, facts.dtype, max_tokens=max_tokens),
        *check_model(model, facts, block_size, max_tokens=max_tokens, workspace=workspace),
    ]
    if model.spec.pooling is None:
        comparisons += check_sampling(model.spec.vocab_size, model.device)
    torch.cuda.empty_cache()
    return SelfTest(linears.excluded, comparisons)
