"""Low-rank adapters on a CPU: exact for invariance, against float64 for accuracy, and controls that must fail."""

from __future__ import annotations

import pytest
import torch
from lora_cases import NONE, LoraCase, lora_case
from matmul_order import product_in_order

from sempre.kernels.lora import AdapterRows, LoraShape, adapter_rows, add_adapters
from sempre.kernels.threads import get_num_threads, set_num_threads

SHAPES = [(576, (576, 192, 192)), (64, (33,)), (100, (7, 64)), (1, (1,)), (129, (320, 5))]
ROWS = 40


def case(in_features: int, widths: tuple[int, ...]) -> LoraCase:
    full = [tuple(rank for _ in widths) for rank in (16, 1, 5, 33, 70)]
    partial = tuple(8 if index % 2 == 0 else 0 for index, _ in enumerate(widths))
    return lora_case(in_features, widths, [*full, partial], torch.float32, ROWS)


def owners_of(seed: int, count: int, num_adapters: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(NONE, num_adapters, (count,), generator=generator).tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_depends_on_its_own_adapter_alone(shape: tuple[int, tuple[int, ...]]) -> None:
    each = case(*shape)
    alone = {
        (row, owner): each.run([row], [owner])[0] for row in range(ROWS) for owner in range(NONE, len(each.adapters))
    }
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(ROWS, generator=generator)[: 1 + seed * 3].tolist()
        owners = owners_of(seed, len(rows), len(each.adapters))
        together = each.run(rows, owners)
        for found, row, owner in zip(together, rows, owners, strict=True):
            assert torch.equal(found, alone[row, owner])
    # a control: another adapter gives another row
    assert not torch.equal(alone[0, 0], alone[0, 2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_against_float64(shape: tuple[int, tuple[int, ...]]) -> None:
    each = case(*shape)
    for owner in range(len(each.adapters)):
        found = each.run(list(range(ROWS)), [owner] * ROWS)
        expected = torch.stack([each.expected(row, owner) for row in range(ROWS)])
        assert (found - expected).norm() / expected.norm() < 5e-7


def test_a_row_without_an_adapter_is_the_base() -> None:
    each = case(64, (33,))
    rows = list(range(ROWS))
    found = each.run(rows, [row % 3 - 1 for row in rows])
    for row in rows:
        assert torch.equal(found[row], each.base[row]) == (row % 3 == 0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_is_the_documented_one(stored: torch.dtype) -> None:
    """Also where A and B are kept in 16 bit, which holds them exactly."""
    each = lora_case(129, (320, 5), [(33, 33), (70, 3)], torch.float32, ROWS, stored)
    for owner, adapter in enumerate(each.adapters):
        changes = []
        for part in adapter:
            assert part is not None
            inner = product_in_order(each.x.numpy(), part.a.numpy())
            changes.append(torch.from_numpy(product_in_order(inner, part.b.numpy())))
        assert torch.equal(each.run(list(range(ROWS)), [owner] * ROWS), each.base + torch.cat(changes, 1))
    in_float32 = lora_case(129, (320, 5), [(33, 33), (70, 3)], torch.float32, ROWS).slots.nbytes
    assert each.slots.nbytes == (in_float32 if stored == torch.float32 else in_float32 // 2)


def test_neither_threads_nor_slots_decide() -> None:
    each = case(576, (576, 192, 192))
    rows, owners = list(range(ROWS)), owners_of(1, ROWS, len(each.adapters))
    before, found = get_num_threads(), []
    for threads in (1, 2):
        set_num_threads(threads)
        found.append(each.run(rows, owners))
    set_num_threads(before)
    assert torch.equal(*found)
    for slot, adapter in enumerate(reversed(each.adapters)):
        each.slots.put(slot, adapter)
    assert not torch.equal(each.run(rows, owners), found[0])
    swapped = [owner if owner == NONE else len(each.adapters) - 1 - owner for owner in owners]
    assert torch.equal(each.run(rows, swapped), found[0])


def test_a_slot_is_emptied() -> None:
    each = case(64, (33,))
    each.slots.put(0, (None,))
    assert torch.equal(each.run([5], [0])[0], each.base[5])


def test_what_does_not_fit_is_refused() -> None:
    each = case(64, (33,))
    rows = adapter_rows(torch.zeros(ROWS, dtype=torch.int32))
    out = torch.empty_like(each.base)
    with pytest.raises(ValueError, match="do not fit"):
        add_adapters(each.x[:, :32].contiguous(), each.base, each.slots, rows, out)
    with pytest.raises(ValueError, match="do not fit"):
        add_adapters(each.x[:4], each.base[:4], each.slots, rows, out[:4])
    with pytest.raises(ValueError, match="int32"):
        add_adapters(each.x, each.base, each.slots, AdapterRows(torch.zeros(ROWS, dtype=torch.int64)), out)
    with pytest.raises(ValueError, match="parts"):
        LoraShape(64, (1, 1, 1, 1, 1), 1, 16)
