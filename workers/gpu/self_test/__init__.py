"""Start-up self-test on a GPU: for this model's shapes, each kernel that may be chosen gives the bits of a reference.

A product kernel that disagrees is left out of the choice for its weight; the fingerprint names it. Anything else that
disagrees with itself raises InvarianceError, and the worker does not serve. Nothing here draws from the global
generators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sempre.kernels.attention import AttentionWorkspace
from sempre.workers.gpu.self_test.attention import check_attention
from sempre.workers.gpu.self_test.comparisons import Comparison, compare, require_equal
from sempre.workers.gpu.self_test.products import check_products, require_fp8
from sempre.workers.gpu.self_test.rows import check_rows
from sempre.workers.gpu.self_test.sampling import check_sampling
from sempre.workers.models.decoder import DecoderWeights
from sempre.workers.models.spec import ModelSpec

__all__ = ["Comparison", "SelfTest", "compare", "require_equal", "require_fp8", "run_self_test"]


class SelfTest(NamedTuple):
    """What was found; `require_equal` judges the comparisons."""

    weights: DecoderWeights
    """without the product kernels that disagree"""
    excluded: dict[str, list[str]]
    """those kernels by shape, for the fingerprint"""
    comparisons: list[Comparison]


def run_self_test(
    spec: ModelSpec,
    weights: DecoderWeights,
    workspace: AttentionWorkspace,
    *,
    block_size: int,
    max_tokens: int,
    max_num_seqs: int,
) -> SelfTest:
    """Every operation of the model's forward pass, and sampling. A step has at most `max_tokens` tokens."""
    device = weights.embedding.device
    products = check_products(weights, max_tokens=max_tokens, max_num_seqs=max_num_seqs)
    comparisons = [
        *products.reference,
        *check_rows(spec, weights, block_size),
        *check_attention(spec, weights.dtype, block_size, workspace, device),
        *check_sampling(spec.vocab_size, device),
    ]
    torch.cuda.empty_cache()
    return SelfTest(products.weights, products.excluded, comparisons)
