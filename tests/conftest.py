"""Settings for all tests: reproducible property tests without their own time limits; interrupts as in a terminal."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# read when Triton is imported, which any test module may be the first to do
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# two threads even on a one-core machine, where comparing one thread with itself would show nothing
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, os.cpu_count() or 1)))

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")

# a suite started in the background ignores interrupts, and so would every process its tests start
signal.signal(signal.SIGINT, signal.default_int_handler)


_LINES = (Path(__file__).parent / "product_cases.txt").read_text(encoding="utf-8").splitlines()
PRODUCT_CASES = tuple(line for line in _LINES if not line.startswith("#"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the listed cases before the marker expression selects."""
    for item in items:
        if item.nodeid.startswith(PRODUCT_CASES):
            item.add_marker(pytest.mark.product)


@pytest.fixture(autouse=True)
def log_is_left_as_it_was() -> Iterator[None]:
    """A command called by a test logs to that test's standard error, which closes with it."""
    logger = logging.getLogger("sempre")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
