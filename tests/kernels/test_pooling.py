"""Sums of rows on a CPU."""

from __future__ import annotations

import pytest
import torch
from pooling_cases import check_spans, check_sums, spans

from sempre.kernels.pooling import add_rows


def test_sums() -> None:
    check_sums("cpu", torch.float32)


def test_spans() -> None:
    check_spans("cpu")


def test_wrong_sums_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sums torch\.float32"):
        add_rows(torch.ones(2, 16), spans("cpu", (0, 1, 0, 1)), torch.zeros(1, 16))
