"""Which shapes of a decode step a graph is captured for."""

from __future__ import annotations

import pytest

from sempre.workers.gpu.decode_graphs import context_bucket, row_buckets


def test_buckets_reach_exactly_the_largest_batch() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(3) == [1, 2, 3]
    assert row_buckets(20) == [1, 2, 4, 8, 16, 20]
    assert row_buckets(256)[-1] == 256
    assert row_buckets(300)[-2:] == [256, 300]
    assert row_buckets(5000)[-1] == 1024


def test_padding_is_small() -> None:
    buckets = row_buckets(1024)
    for rows in range(1, 1025):
        bucket = next(b for b in buckets if b >= rows)
        assert bucket - rows < max(8, rows / 4)


@pytest.mark.parametrize(
    ("context", "bound"), [(1, 512), (512, 512), (513, 1024), (1025, 2048), (4097, 8192), (9000, 10000)]
)
def test_contexts(context: int, bound: int) -> None:
    assert context_bucket(context, 10000) == bound


def test_a_short_model_bounds_the_context() -> None:
    assert context_bucket(100, 512) == 512
