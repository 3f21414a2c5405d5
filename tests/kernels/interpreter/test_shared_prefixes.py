"""Keys shared by the requests of a step, read once: interpreted, with every row of a product summed by itself."""

from __future__ import annotations

import pytest
import torch
from rows_summed_alone import sum_rows_alone
from shared_prefix_cases import (
    Requests,
    SharedStep,
    check_beside_prompts,
    check_shared_prefixes,
    check_that_keys_are_read_once,
)

from sempre.kernels.attention import HeadLayout

SPLIT = 128
# groups within groups, one of more rows than a tile has, one request that shares nothing, one that ends with its split
TREE: Requests = [("aa", 5), ("ab", 70), ("", 9), ("aa", 0), ("ab", 1), ("c", 130), ("c", 3), ("aad", 7)]


@pytest.fixture(autouse=True)
def _rows_summed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from sempre.kernels.attention import gpu, gpu_prefix

    sum_rows_alone(monkeypatch)
    for module in (gpu, gpu_prefix):
        monkeypatch.setattr(module, "SPLIT", SPLIT)


@pytest.mark.parametrize(
    ("heads", "dtype", "block", "soft_cap", "with_sinks"),
    [
        (HeadLayout(4, 2, 16), torch.float16, 64, None, False),
        (HeadLayout(3, 1, 80), torch.float32, 32, None, False),
        (HeadLayout(2, 2, 16), torch.float16, 16, 1.5, False),
        (HeadLayout(16, 1, 16), torch.float16, 64, None, True),
        (HeadLayout(7, 1, 16, kv_parts=1), torch.float16, 16, 1.5, True),
    ],
    ids=str,
)
def test_the_bits_are_those_of_reading_all_keys_for_each(
    heads: HeadLayout, dtype: torch.dtype, block: int, soft_cap: float | None, with_sinks: bool
) -> None:
    check_shared_prefixes(SharedStep(TREE, heads, dtype, "cpu", SPLIT, block, soft_cap=soft_cap, with_sinks=with_sinks))


def test_groups_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut both by the tile's requests and by its rows."""
    from sempre.kernels.attention import gpu_prefix, shared_prefixes

    for module in (gpu_prefix, shared_prefixes):
        monkeypatch.setattr(module, "TILE_REQUESTS", 5)
    step = SharedStep([("a", row % 3) for row in range(12)], HeadLayout(16, 1, 16), torch.float16, "cpu", SPLIT)
    arrays = step.arrays()
    assert arrays is not None
    assert arrays.tiles[: arrays.num_tiles[0]].tolist() == [[0, 0, 5], [0, 5, 5], [0, 10, 2]]
    check_shared_prefixes(step)


def test_beside_requests_of_several_rows() -> None:
    step = SharedStep([*TREE, ("aa", 3)], HeadLayout(4, 2, 16), torch.float16, "cpu", SPLIT, with_sinks=True)
    check_beside_prompts(step)


def test_keys_are_read_for_the_group() -> None:
    step = SharedStep([("ab", 3), ("ab", 40), ("ab", 0)], HeadLayout(4, 2, 16), torch.float16, "cpu", SPLIT)
    check_that_keys_are_read_once(step)


def test_a_layer_with_a_window_reads_for_each() -> None:
    step = SharedStep(TREE, HeadLayout(2, 1, 16), torch.float16, "cpu", SPLIT, window=100)
    expected = step.attend(step.batch(None))
    assert torch.equal(step.attend(step.batch(step.arrays())), expected)
    assert step.ran == "gpu"
