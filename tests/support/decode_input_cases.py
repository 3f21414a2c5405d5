"""Cases of the decode inputs, run by the tests in the interpreter and on the GPU."""

from __future__ import annotations

import torch

from sempre.kernels.decode_inputs import DecodeInputs, decode_inputs, record_tokens

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
