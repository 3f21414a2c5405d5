"""Sums of rows in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from pooling_cases import check_spans, check_sums

from sempre.kernels import pooling


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sempre.kernels.pooling import cpu, gpu

    monkeypatch.setattr(cpu, "add_rows", gpu.add_rows)
    assert pooling.add_rows is not gpu.add_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums(dtype: torch.dtype) -> None:
    check_sums("cpu", dtype)


def test_spans() -> None:
    check_spans("cpu")
