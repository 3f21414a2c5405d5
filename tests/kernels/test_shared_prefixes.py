"""Which rows of a step are grouped by the splits they share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sempre.kernels.attention import SharedPrefixes
from sempre.kernels.attention.shared_prefixes import (
    MAX_ENTRIES,
    TILE_REQUESTS,
    group_requests,
    most_shared_splits,
)


def _ids(rows: list[str]) -> npt.NDArray[np.int32]:
    """A letter for the content of each split, "." for one that is not shared."""
    depth = max(map(len, rows))
    names = sorted({(at, row[at]) for row in rows for at in range(len(row)) if row[at] != "."})
    ids = np.zeros((len(rows), depth), np.int32)
    for index, row in enumerate(rows):
        for at, letter in enumerate(row):
            if letter != ".":
                ids[index, at] = 1 + names.index((at, letter))
    return ids


@given(st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=150), st.integers(0, 7))
def test_each_leading_shared_split_is_in_one_tile_with_its_like(rows: list[str], padding: int) -> None:
    ids = _ids(rows)
    arrays = group_requests(ids, len(rows) + padding, least_saved=1)
    if arrays is None:
        first = [row[0] for row in rows if row[0] != "."]
        assert len(first) == len(set(first))
        return
    assert arrays.counts.tolist()[len(rows) :] == [0] * padding
    found: dict[tuple[int, int], int] = {}
    for split, start, count in arrays.tiles[: arrays.num_tiles[0]].tolist():
        members = arrays.requests[start : start + count].tolist()
        assert 0 < count <= TILE_REQUESTS
        assert len({ids[row, split] for row in members}) == 1
        for row in members:
            assert found.setdefault((row, split), start) == start
    assert sorted(found) == [(row, split) for row in range(len(rows)) for split in range(arrays.counts[row])]
    for (row, split), _ in found.items():
        assert any(other != row and ids[other, split] == ids[row, split] for other, _ in found)
    # what is left out is not shared with a row that could be with it
    for row, count in enumerate(arrays.counts.tolist()[: len(rows)]):
        if count < len(rows[row]) and ids[row, count] > 0:
            like = [r for r in range(len(rows)) if r != row and ids[r, count] == ids[row, count]]
            assert all(arrays.counts[r] < count for r in like)


def test_few_savings_do_not_pay() -> None:
    assert group_requests(_ids(["aaaa", "aaaa"]), 2, least_saved=5) is None
    assert group_requests(_ids(["aaaa", "aaaa"]), 2, least_saved=4) is not None


def test_the_workspace_bounds_what_is_shared() -> None:
    assert [most_shared_splits(rows, 1000) for rows in (1, 64, 1024)] == [1000, MAX_ENTRIES // 64, MAX_ENTRIES // 1024]
    assert most_shared_splits(8, 3) == 3


def test_arrays_of_another_type_are_refused() -> None:
    right = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"SharedPrefixes: expected tiles as contiguous torch\.int32"):
        SharedPrefixes(right, right.long(), right, right, max_splits=1)
