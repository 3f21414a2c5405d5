"""Attention on a GPU beside keys and values that are not finite, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from nonfinite_cases import Damage
from paged_sequences import PagedSequences, check_damage


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("damage", "window"),
    [(Damage("value", float("nan"), torch.float32), None), (Damage("key", float("-inf"), torch.float16), 37)],
    ids=str,
)
def test_rows_that_see_no_damage_keep_their_bits(
    damage: Damage, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sempre.kernels.attention import gpu

    # so that the damage lies in the second split
    monkeypatch.setattr(gpu, "SPLIT", 64)
    sequences = PagedSequences((70, 2), 2, 1, 16, damage.dtype, "cpu", block=16, window=window)
    check_damage(sequences, damage, [67], [(0, 64, 70), (1, 1, 2)])
