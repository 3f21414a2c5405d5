"""The self-test of packed weights: every tile that the table may choose gives the bits that the reference tile of the
other linear layers gives with the widened weight."""

from __future__ import annotations

import torch

from sempre.kernels.gpu_jit import architecture
from sempre.kernels.linear import gpu as dense
from sempre.kernels.linear.gpu_table import REFERENCE
from sempre.kernels.packed import PackedWeight
from sempre.kernels.packed.gpu import dense_weight, run_tile
from sempre.kernels.packed.gpu_table import choices


def disagreeing_packed(w: PackedWeight, *, max_rows: int, out_dtype: torch.dtype) -> dict[str, int]:
    """Tiles that differ on this weight, with the number of different elements; as `kernels.linear.gpu_check`."""
    device = w.words.device
    plans = choices(architecture(device), w, max_rows)
    if not plans:
        return {}
    generator = torch.Generator(device).manual_seed(0x5E3F)
    most = max(max(counts) for counts in plans.values())
    x = torch.randn(most, w.in_features, generator=generator, device=device, dtype=w.dtype)
    nan = torch.full((most, w.out_features), float("nan"), device=device, dtype=out_dtype)
    expected = dense.run_tile(x, dense_weight(w), nan.clone(), REFERENCE)
    differences: dict[str, torch.Tensor] = {}
    for tile, counts in plans.items():
        for rows in counts:
            found = run_tile(x[:rows], w, nan[:rows].clone(), tile)
            wrong = (found != expected[:rows]).sum()
            differences[str(tile)] = differences.get(str(tile), 0) + wrong
    return {name: int(count) for name, count in differences.items() if int(count)}
