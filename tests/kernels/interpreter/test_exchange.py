"""Sums and moves of rows between the GPUs of several ranks, in the interpreter: each rank is a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from exchange_cases import missing, moves, sums
from gpu_ranks import in_processes


def product(*values: object) -> object:
    """Four processes that wait for each other take minutes."""
    return pytest.param(*values, marks=pytest.mark.product)


@pytest.mark.parametrize("size", [2, product(4)])
def test_sums_are_trees_over_the_ranks(size: int, tmp_path: Path) -> None:
    assert in_processes(size, sums, tmp_path) == [[]] * size


@pytest.mark.parametrize("size", [2, product(4)])
def test_rows_and_columns_are_gathered(size: int, tmp_path: Path) -> None:
    assert in_processes(size, moves, tmp_path) == [[]] * size


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    assert in_processes(2, missing, tmp_path) == ["1", ""]
