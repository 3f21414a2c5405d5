"""Sums and moves of rows between two GPUs: the bits of one device, for odd shapes too."""

from __future__ import annotations

from pathlib import Path

import pytest
from exchange_cases import missing, moves, sums
from gpu_ranks import in_processes

pytestmark = pytest.mark.gpu


def test_sums_are_trees_over_the_ranks(tmp_path: Path) -> None:
    assert in_processes(2, sums, tmp_path) == [[], []]


def test_rows_and_columns_are_gathered(tmp_path: Path) -> None:
    assert in_processes(2, moves, tmp_path) == [[], []]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    assert in_processes(2, missing, tmp_path) == ["1", ""]
