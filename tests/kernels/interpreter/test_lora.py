"""The kernels of low-rank adapters in Triton's interpreter: both forms, any mixture, equal bits."""

from __future__ import annotations

import pytest
import torch
from lora_cases import NONE, lora_case

from sempre.kernels.lora import AdapterRows

ROWS = 18
RANKS = [(16, 4), (3, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_both_forms_and_of_any_mixture(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sempre.kernels.lora import gpu

    monkeypatch.setattr(gpu, "SPLIT", 128)
    monkeypatch.setattr(gpu, "BLOCK_N", 32)
    each = lora_case(150, (40, 9), RANKS, dtype, ROWS)
    slots = gpu.GpuLoraSlots(each.shape, dtype, torch.device("cpu"))
    slots.allocate(lambda role, shape, dtype: torch.full(shape, float("nan"), dtype=dtype), ROWS)
    for slot, adapter in enumerate(each.adapters):
        slots.put(slot, adapter)

    def run(rows: list[int], owners: list[int], *, lone_rows: bool) -> torch.Tensor:
        owner = AdapterRows(torch.tensor(owners, dtype=torch.int32))
        out = torch.full((len(rows), 49), float("nan"), dtype=dtype)
        return slots.run(each.x[rows], each.base[rows], owner, out, lone_rows=lone_rows)

    rows = list(range(ROWS))
    mixtures = [[row % 3 - 1 for row in rows], [row // 7 - 1 for row in rows]]
    for owners in mixtures:
        lone, tiled = (run(rows, owners, lone_rows=form) for form in (True, False))
        assert torch.equal(lone, tiled)
        order = rows[::-1]
        assert torch.equal(run(order, owners[::-1], lone_rows=False), tiled.flip(0))
        for row in (1, 17):
            assert torch.equal(run([row], [owners[row]], lone_rows=True)[0], tiled[row])
        for row, owner in enumerate(owners):
            expected = each.base[row].double() if owner == NONE else each.expected(row, owner)
            error = (tiled[row].double() - expected).norm() / expected.norm()
            assert error < (1e-6 if dtype == torch.float32 else 5e-4)
            assert owner != NONE or torch.equal(tiled[row], each.base[row].to(dtype))
    if dtype == torch.float16:
        return
    # a control: the rank's order of additions is seen, which rounding to float16 may hide
    turned = gpu.GpuLoraSlots(each.shape, dtype, torch.device("cpu"))
    turned.allocate(lambda role, shape, dtype: torch.empty(shape, dtype=dtype), ROWS)
    first, second = each.adapters[0]
    assert first is not None
    turned.put(0, (type(first)(first.a.flip(0), first.b.flip(1)), second))
    owner = AdapterRows(torch.zeros(ROWS, dtype=torch.int32))
    base = torch.zeros(ROWS, 49)
    found = [s.run(each.x, base, owner, torch.empty(ROWS, 49, dtype=dtype), lone_rows=False) for s in (slots, turned)]
    assert not torch.equal(found[0], found[1])
