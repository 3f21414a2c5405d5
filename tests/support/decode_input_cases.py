"""Cases of the decode inputs, run by the tests in the interpreter and on the GPU."""

from __future__ import annotations

import torch

from sempre.kernels.decode_inputs import (
    DecodeInputs,
    DraftRows,
    SampledDrafts,
    decode_inputs,
    next_draft_rows,
    record_tokens,
)

BLOCK_SIZE = 16
WIDTH = 600
POISON = -7


def check_decode_inputs(device: torch.device) -> None:
    """Rows with and without a new block, long and short, and padding, against a loop over the contract."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor(
        [[3, -1, 0, 7, 2], [BLOCK_SIZE * 400 + 3, 0, 0, 31, 32], [-1, -1, 77, -1, 99]], dtype=torch.int32
    )
    last_tokens = torch.arange(100, 108)
    tables = torch.randint(0, 1000, (8, WIDTH), dtype=torch.int32, generator=generator)
    expected_tables = tables.clone()
    expected_tables[0, 0], expected_tables[2, 2] = 77, 99
    out = DecodeInputs(
        token_ids=torch.full((5,), POISON, device=device),
        positions=torch.full((5,), POISON, device=device),
        slot_mapping=torch.full((5,), POISON, device=device),
        context_lens=torch.full((5,), POISON, dtype=torch.int32, device=device),
        block_tables=torch.full((5, WIDTH), POISON, dtype=torch.int32, device=device),
    )
    on_device = tables.to(device)
    decode_inputs(rows.to(device), last_tokens.to(device), on_device, BLOCK_SIZE, out)
    assert torch.equal(on_device.cpu(), expected_tables)
    found = DecodeInputs(*(tensor.cpu() for tensor in out))
    for row, (slot, position, _) in enumerate(rows.T.tolist()):
        numbers = [int(tensor[row]) for tensor in found[:4]]
        if slot < 0:
            assert numbers == [0, 0, -1, 0]
            continue
        blocks = position // BLOCK_SIZE + 1
        table = expected_tables[slot]
        place = int(table[blocks - 1]) * BLOCK_SIZE + position % BLOCK_SIZE
        assert numbers == [int(last_tokens[slot]), position, place, position + 1]
        assert torch.equal(found.block_tables[row, :blocks], table[:blocks])
        assert (found.block_tables[row, blocks:] == POISON).all()


def check_record_tokens(device: torch.device) -> None:
    """300 rows, more than one program's, every third of them padding."""
    slots = torch.tensor([-1 if row % 3 == 0 else row for row in range(300)], dtype=torch.int32)
    last_tokens = torch.full((300,), POISON, device=device)
    record_tokens(slots.to(device), torch.arange(1000, 1300, device=device), last_tokens)
    expected = [POISON if row % 3 == 0 else 1000 + row for row in range(300)]
    assert last_tokens.tolist() == expected


def check_next_draft_rows(device: torch.device) -> None:
    """Rows that go on, end, are in error, and padding; then once more, in place, by which one more ends."""
    most, width = 4, 5
    tables = torch.arange(5 * width, dtype=torch.int32).reshape(5, width) + 100
    starts = torch.tensor([BLOCK_SIZE - 1, 40, 7, 0, 2 * BLOCK_SIZE - 2], dtype=torch.int32)
    ends = starts + torch.tensor([1, 0, 3, 3, 3], dtype=torch.int32)
    tokens = torch.arange(1000, 1005)
    head = torch.zeros(5, 4, dtype=torch.int32)
    head[2, 1] = 2
    drafts = torch.full((5, most), POISON, dtype=torch.int32, device=device)
    sampled = SampledDrafts(*(tensor.to(device) for tensor in (tokens, head, starts, ends)), drafts)
    out = DraftRows(
        *(torch.full((5,), POISON, dtype=torch.int32, device=device) for _ in range(2)),
        *(torch.full((5,), POISON, device=device) for _ in range(3)),
    )
    slots = torch.tensor([3, 1, 0, -1, 2], dtype=torch.int32).to(device)
    next_draft_rows(slots, starts.to(device), sampled, tables.to(device), BLOCK_SIZE, out)
    assert out.slots.tolist() == [3, -1, -1, -1, 2]
    assert out.context_lens.tolist() == [BLOCK_SIZE, 0, 0, 0, 2 * BLOCK_SIZE - 1]
    assert out.token_ids.tolist() == [1000, 0, 0, 0, 1004]
    assert out.positions.tolist() == [BLOCK_SIZE - 1, 0, 0, 0, 2 * BLOCK_SIZE - 2]
    places = [100 * BLOCK_SIZE + BLOCK_SIZE - 1, -1, -1, -1, 121 * BLOCK_SIZE + BLOCK_SIZE - 2]
    assert out.slot_mapping.tolist() == places
    next_draft_rows(out.slots, out.context_lens, sampled, tables.to(device), BLOCK_SIZE, out)
    assert out.slots.tolist() == [-1, -1, -1, -1, 2]
    assert out.context_lens.tolist() == [0, 0, 0, 0, 2 * BLOCK_SIZE]
    assert out.slot_mapping.tolist() == [-1, -1, -1, -1, 121 * BLOCK_SIZE + BLOCK_SIZE - 1]
    nothing = [POISON] * most
    assert drafts.tolist() == [
        [1000, 1000, POISON, POISON],
        [1001, *nothing[1:]],
        [-1, *nothing[1:]],
        nothing,
        [1004, 1004, POISON, POISON],
    ]
