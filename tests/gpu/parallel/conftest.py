"""Tests of several GPUs of one host: skipped, with the reason, where there are fewer than two."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two NVIDIA GPUs: found {torch.cuda.device_count()}")
