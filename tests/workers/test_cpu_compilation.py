"""The process that compiles the sampler's kernels at the first start on a machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sempre.workers.cpu.compilation import SamplingCompilation

PROBE = """
import numpy as np, torch
from numba.core import event
from sempre.kernels.jit import compile_seconds
from sempre.kernels.sampling import SamplingRows, logprobs, sample
from sempre.workers.cpu import compilation

compiled = []
class Listener(event.Listener):
    def on_start(self, found): compiled.append(found.data["dispatcher"].py_func.__name__)
    def on_end(self, found): pass
event.register("numba:compile", Listener())
started = compilation.SamplingCompilation.start()
if started is not None:
    started.finish()
logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
rows = SamplingRows.of(seeds=[0, 1, 2], temperature=[1, 0, 1], top_k=[9, 0, 0], top_p=[0.5, 1, 1], min_p=[0, 0, 0.1])
ids = sample(logits, rows, np.arange(3)).token_ids
logprobs(logits, np.arange(3), ids.astype(np.int64), 2)
print(started is not None, compiled, compile_seconds() > 0.1)
"""
several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core compiles one thing at a time")


def _probe(cache: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        env=os.environ | {"SEMPRE_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return done


@several_cores
def test_it_runs_once_and_this_process_then_compiles_nothing(tmp_path: Path) -> None:
    assert _probe(tmp_path).stdout.strip() == "True [] True", "the time in which it waits counts"
    assert _probe(tmp_path).stdout.strip() == "False [] False"


def test_nothing_is_started_where_nothing_can_be_kept() -> None:
    printed = _probe(Path("/proc/nowhere")).stdout.strip()
    assert printed.startswith("False ['truncate_rows'")
    assert printed.endswith("] True")


def test_a_compiler_that_dies_is_reported_and_the_start_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    started = SamplingCompilation()
    started._popen.kill()
    with caplog.at_level(logging.WARNING):
        started.finish()
    assert "compiler ended with -9, so they are compiled here" in caplog.text


def test_closing_ends_it_and_may_be_repeated() -> None:
    started = SamplingCompilation()
    started.close()
    started.close()
    assert started._popen.returncode == -9
