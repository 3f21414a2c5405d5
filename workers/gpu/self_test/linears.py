"""Self-test of the linear layers: each kernel that may be chosen for a weight gives the bits of one reference kernel.

One that disagrees is excluded from the choice for its shape. The reference must give a row the same bits alone and
among others; when it does not, there is nothing to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from sempre.ipc.errors import ConfigError
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.integers import IntegerScheme
from sempre.kernels.linear.gpu import FP8_CAPABILITY, operands, run_tile
from sempre.kernels.linear.gpu_check import disagreeing, disagreeing_fused
from sempre.kernels.linear.gpu_table import FLOAT32, REFERENCES, Tile
from sempre.kernels.linear.weights import GpuLinearWeight
from sempre.kernels.packed import PackedScheme, PackedWeight
from sempre.kernels.packed.gpu import dense_weight
from sempre.kernels.packed.gpu_check import disagreeing_packed
from sempre.workers.layers.expert_linear import ExpertLinear
from sempre.workers.layers.linear import Use
from sempre.workers.loading import WeightFacts
from sempre.workers.models.base import CausalLM
from sempre.workers.prompt_logprobs import PROMPT_LOGPROB_ROWS
from sempre.workers.self_test import Comparison, compare, distinct_linears, shape_of

# beyond one tile of the reference, with a ragged end
REFERENCE_ROWS = 70
LONE_ROWS = (0, 1, 63, 64, 69)

Shape = tuple[int, int, Fp8Scheme | IntegerScheme | PackedScheme | None, int]


class LinearTest(NamedTuple):
    """What the test found."""

    excluded: dict[str, list[str]]
    """kernels that disagree, by shape, for the fingerprint"""
    reference: list[Comparison]
    """of the reference kernel with itself, to be judged"""


def require_fp8(facts: WeightFacts, device: torch.device) -> None:
    """Raise ConfigError where the GPU cannot compute with the fp8 matrices of the model."""
    capability = torch.cuda.get_device_capability(device)
    if facts.quantization is not None and capability < FP8_CAPABILITY:
        least, found = (f"sm_{major}{minor}" for major, minor in (FP8_CAPABILITY, capability))
        raise ConfigError(
            f"quantization: expected a GPU of {least} or later for {facts.quantization.value}, found"
            f" {torch.cuda.get_device_name(device)} ({found}). Use a checkpoint that is not quantised, or the CPU.",
            parameter="quantization",
            value=facts.quantization.value,
        )


def check_linears(model: CausalLM, dtype: torch.dtype, *, max_tokens: int, max_num_seqs: int) -> LinearTest:
    """Every (N, K) of the model once, at the row counts where another kernel is chosen; kernels that disagree are
    excluded for all matrices of that shape."""
    excluded: dict[Shape, set[str]] = {}
    reference: list[Comparison] = []
    for path, linear in distinct_linears(model):
        if isinstance(linear, ExpertLinear):
            continue  # other kernels compute these
        stored = linear.weight
        # for many rows, and as the reference of few, a packed weight is widened
        weight = dense_weight(stored) if isinstance(stored, PackedWeight) else stored
        assert isinstance(weight, GpuLinearWeight)
        logits = linear.use is Use.LOGITS
        # logits are float32, and are computed for the rows that sample or are scored
        max_rows = min(max_tokens, max(max_num_seqs, PROMPT_LOGPROB_ROWS)) if logits else max_tokens
        out_dtype = torch.float32 if linear.stores_float32 else dtype
        # adapters are added to float32 results, which are then rounded as the others
        outputs = {out_dtype} if linear.adapters is None else {out_dtype, torch.float32}
        wrong: set[str] = set()
        for output in outputs:
            wrong |= set(disagreeing(weight, dtype, max_rows=max_rows, out_dtype=output))
            if isinstance(stored, PackedWeight):
                wrong |= set(disagreeing_packed(stored, max_rows=max_rows, out_dtype=output))
        if linear.activation is not None and stored is weight:
            wrong |= set(disagreeing_fused(weight, linear.activation, max_rows=max_rows))
        if wrong:
            excluded.setdefault(shape_of(stored), set()).update(wrong)
        reference += _check_reference(path.rpartition(".")[2], weight, dtype, out_dtype)
    if excluded:
        _exclude(model, excluded)
    return LinearTest({_name(shape): sorted(choices) for shape, choices in excluded.items()}, reference)


def _name(shape: Shape) -> str:
    columns, depth, scheme, leaves = shape
    formats = [scheme.value] if scheme is not None else []
    return ",".join([f"N={columns}", f"K={depth}", *formats, *([f"leaves={leaves}"] if leaves > 1 else [])])


def _check_reference(name: str, w: GpuLinearWeight, dtype: torch.dtype, out_dtype: torch.dtype) -> Iterator[Comparison]:
    device = w.weight.device
    widens = w.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS
    tile = FLOAT32 if dtype == torch.float32 and widens else REFERENCES[w.scheme]
    generator = torch.Generator(device).manual_seed(0x5E3F)
    x = torch.randn(REFERENCE_ROWS, w.in_features, generator=generator, device=device, dtype=dtype)
    among_others = _run_reference(x, w, out_dtype, tile)
    operation = f"linear {name} [N={w.out_features}, K={w.in_features}], {tile}"
    for row in LONE_ROWS:
        alone = _run_reference(x[row : row + 1], w, out_dtype, tile)
        yield compare(operation, f"row {row} of {REFERENCE_ROWS} against itself alone", alone[0], among_others[row])


def _run_reference(x: torch.Tensor, w: GpuLinearWeight, out_dtype: torch.dtype, tile: Tile) -> torch.Tensor:
    out = torch.empty(x.shape[0], w.out_features, dtype=out_dtype, device=x.device)
    values, scales = operands(x, w)
    return run_tile(values, w, out, tile, scales)


def _exclude(model: CausalLM, excluded: dict[Shape, set[str]]) -> None:
    for _, linear in model.linears():
        weight = linear.weight
        assert isinstance(weight, GpuLinearWeight | PackedWeight)
        linear.weight = replace(weight, excluded=frozenset(excluded.get(shape_of(weight), ())))
