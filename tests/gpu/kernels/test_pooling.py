"""Sums of rows on a GPU: bit for bit those of a CPU."""

from __future__ import annotations

import pytest
import torch
from pooling_cases import check_spans, check_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums(dtype: torch.dtype) -> None:
    check_sums("cuda", dtype)


def test_spans() -> None:
    check_spans("cuda")
