"""Self-test of the experts' linear layers: each tile that may be chosen gives the bits of the reference tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.linear.gpu_table import FLOAT32, REFERENCES
from sempre.kernels.moe import expert_scratch
from sempre.kernels.moe import gpu as moe_gpu
from sempre.kernels.moe.gpu_dispatch import dispatch
from sempre.workers.layers.moe import SparseMLP
from sempre.workers.models.base import CausalLM
from sempre.workers.self_test import Comparison, compare

# where experts are few, one of them has more rows than a tile holds
ROWS = 200


def check_experts(model: CausalLM, dtype: torch.dtype, *, max_tokens: int) -> Iterator[Comparison]:
    """Every shape of a mixture once, with the model's own weights. A step has at most `max_tokens` tokens."""
    mixtures = {module.shape(): module for _, module in model.walk() if isinstance(module, SparseMLP)}
    for mixture in mixtures.values():
        yield from _check(mixture, dtype, max_tokens)


def _check(mixture: SparseMLP, dtype: torch.dtype, max_tokens: int) -> Iterator[Comparison]:
    sizes, experts, rows = mixture.sizes, mixture.experts.stacked, min(ROWS, max_tokens)
    first = experts[0]
    device = first.weight.device
    generator = torch.Generator(device).manual_seed(0x5E3F)
    x = torch.randn(rows, sizes.hidden_size, generator=generator, device=device, dtype=dtype)
    logits = torch.randn(rows, sizes.num_experts, generator=generator, device=device, dtype=torch.float32)
    scratch = expert_scratch(lambda _, shape, kind: torch.empty(shape, dtype=kind, device=device), sizes, rows, dtype)
    k = sizes.experts_per_row
    tiles = {moe_gpu.expert_tile(dtype, count * k, first) for count in range(1, max_tokens + 1)}
    widens = first.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS
    reference = FLOAT32 if dtype == torch.float32 and widens else REFERENCES[first.scheme]
    name = f"experts [E={sizes.num_experts}, K={k}, H={sizes.hidden_size}, I={sizes.intermediate_size}]"
    dispatch(logits, scratch, reference.block_t, renormalize=mixture.renormalize)
    expected = [part.clone() for part in moe_gpu.run_gated(x, experts, scratch, reference)]
    for tile in sorted(tiles - {reference}):
        # so that anything a tile skips shows
        scratch.activated.fill_(float("nan"))
        scratch.parts.fill_(float("nan"))
        dispatch(logits, scratch, tile.block_t, renormalize=mixture.renormalize)
        found = moe_gpu.run_gated(x, experts, scratch, tile)
        for part, wanted, result in zip(experts._fields[:2], expected, found, strict=True):
            yield compare(name, f"{part} by {tile} against {reference}", wanted, result)
