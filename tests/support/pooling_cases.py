"""Cases of the pooling kernel that both kinds of device run."""

from __future__ import annotations

import torch

from sempre.kernels.pooling import RowSpans, add_rows


def spans(device: str, *rows: tuple[int, int, int, int]) -> RowSpans:
    """(first, end, slot, begins) of each request."""
    return RowSpans(*torch.tensor(rows, dtype=torch.int64).T.contiguous().to(device))


def check_sums(device: str, dtype: torch.dtype) -> None:
    """The sum of a prompt's rows is that of one addition after the other, however the prompt is cut."""
    generator = torch.Generator().manual_seed(3)
    # so different in size that their sum in float64 is not exact
    sizes = torch.randint(-14, 14, (41, 200), generator=generator) * (1.0 if dtype == torch.float16 else 3.0)
    hidden = (torch.randn(41, 200, generator=generator) * 2.0**sizes).to(dtype).to(device)
    expected = torch.zeros(200, dtype=torch.float64)
    for row in hidden[3:40].cpu():
        expected = expected + row.double()
    sums = torch.full((3, 200), 7.0, dtype=torch.float64, device=device)
    whole = add_rows(hidden, spans(device, (3, 40, 1, 1)), sums)
    assert torch.equal(whole[1].cpu(), expected)
    assert bool((whole[[0, 2]] == 7.0).all()), "another request's sum was written"
    cut = torch.full((3, 200), float("nan"), dtype=torch.float64, device=device)
    for first, end in ((3, 4), (4, 21), (21, 40)):
        others = (0, 3, 2, 1), (40, 41, 0, 1)
        add_rows(hidden, spans(device, others[0], (first, end, 1, int(first == 3)), others[1]), cut)
    assert torch.equal(cut[1].cpu(), expected)
    # another order of additions is seen
    backwards = hidden.flip(0).contiguous()
    turned = add_rows(backwards, spans(device, (1, 38, 0, 1)), torch.zeros_like(whole))
    assert dtype == torch.float16 or not torch.equal(turned[0].cpu(), expected)


def check_spans(device: str) -> None:
    """An empty span leaves a sum as it is, or starts it."""
    hidden = torch.ones(2, 16, device=device)
    sums = torch.full((2, 16), 5.0, dtype=torch.float64, device=device)
    add_rows(hidden, spans(device, (0, 0, 0, 0), (1, 1, 1, 1)), sums)
    assert sums[:, 0].tolist() == [5.0, 0.0]
