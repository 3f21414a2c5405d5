"""The self-test of matmuls: every kernel the table may choose for a weight gives the bits of one reference kernel."""

from __future__ import annotations

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.activation.gpu import activate_and_mul
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.gpu_jit import architecture
from sempre.kernels.linear.gpu import operands, run_choice, run_fused_tile, run_tile
from sempre.kernels.linear.gpu_table import FUSED_TABLES, REFERENCE, REFERENCES, choices, choose_fused
from sempre.kernels.linear.weights import GpuLinearWeight


def disagreeing(
    w: GpuLinearWeight, dtype: torch.dtype, *, max_rows: int, out_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Choices that differ from the reference tile on this weight, with the number of different elements.

    Random x of `dtype` from a fixed seed, at the row counts where the table changes up to `max_rows`; outputs have
    `out_dtype` (that of x, or float32 for logits) and start as NaN. The names go into `GpuLinearWeight.excluded`. One
    synchronisation at the end.
    """
    device = w.weight.device
    if dtype == torch.float32 and w.scheme is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return {}
    generator = torch.Generator(device).manual_seed(0x5E3F)
    plans = choices(architecture(device), w, max_rows)
    most = max((max(counts) for counts in plans.values()), default=0)
    x = torch.randn(most, w.in_features, generator=generator, device=device, dtype=dtype)
    values, scales = operands(x, w)
    differences: dict[str, torch.Tensor] = {}
    for choice, counts in plans.items():
        for rows in counts:
            part, own = values[:rows], None if scales is None else scales[:rows]
            expected = run_tile(part, w, _nan(rows, w, out_dtype or dtype), REFERENCES[w.scheme], own)
            wrong = (run_choice(part, w, _nan(rows, w, out_dtype or dtype), choice, own) != expected).sum()
            differences[str(choice)] = differences.get(str(choice), 0) + wrong
    return {name: int(count) for name, count in differences.items() if int(count)}


def disagreeing_fused(w: GpuLinearWeight, activation: Activation = Activation.SILU, *, max_rows: int) -> dict[str, int]:
    """Like `disagreeing`, for linear layers fused with the activation: each against the reference in two steps."""
    if w.scheme is not None:
        return {}
    device, dtype, width = w.weight.device, w.weight.dtype, w.out_features // 2
    arch = architecture(device)
    plans = [entry for entry in FUSED_TABLES.get(arch, ()) if width <= entry.max_out]
    if dtype == torch.float32 or w.bias is not None or not plans:
        return {}
    generator = torch.Generator(device).manual_seed(0x5E3F)
    rows = min(plans[-1].max_rows, max_rows)
    x = torch.randn(rows, w.in_features, generator=generator, device=device, dtype=dtype)
    gate_up = run_tile(x, w, _nan(rows, w, dtype), REFERENCE)
    expected = activate_and_mul(gate_up, gate_up.new_empty(rows, width), activation)
    differences: dict[str, torch.Tensor] = {}
    for entry in plans:
        count = min(entry.max_rows, rows)
        tile = choose_fused(arch, count, width, frozenset())
        if tile is not None:
            found = run_fused_tile(x[:count], w, torch.full_like(expected[:count], float("nan")), tile, activation)
            differences[f"fused {tile}"] = (found != expected[:count]).sum()
    return {name: int(wrong) for name, wrong in differences.items() if int(wrong)}


def _nan(rows: int, w: GpuLinearWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, w.out_features), float("nan"), device=w.weight.device, dtype=dtype)
