"""`sempre bench startup`: seconds until an engine is ready, with an empty and with a filled kernel cache."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

from sempre.engine.arguments import engine_config
from sempre.engine.cli.bench.workload import percentiles
from sempre.engine.client import launch
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError

# where compiled kernels of the CPU and of the GPU are kept
CACHE_VARIABLES = ("SEMPRE_CACHE", "TRITON_CACHE_DIR")


def measure(
    model: str, keywords: dict[str, Any], *, num_iters_cold: int, num_iters_warmup: int, num_iters_warm: int
) -> dict[str, Any]:
    """Each start has processes of its own. Raises ConfigError without them: their kernels would stay in memory."""
    config = engine_config(model, **keywords)
    if not config.multiprocessing:
        raise ConfigError(
            "multiprocessing must be on to measure a start.", parameter="multiprocessing", value=config.multiprocessing
        )
    result: dict[str, Any] = {}
    if num_iters_cold:
        cold = []
        for _ in range(num_iters_cold):
            with _empty_caches():
                cold.append(_start(config))
        result |= _summary("cold", cold)
    for _ in range(num_iters_warmup):
        _start(config)
    if num_iters_warm:
        result |= _summary("warm", [_start(config) for _ in range(num_iters_warm)])
    return result


class Start(NamedTuple):
    """Seconds until an engine was ready, and of the phases until then, as `/server_info` names them."""

    seconds: float
    phases: dict[str, float]


def _start(config: EngineConfig) -> Start:
    began = time.perf_counter()
    client = launch(config)
    start = Start(time.perf_counter() - began, client.ready.phase_seconds)
    client.close()
    return start


@contextmanager
def _empty_caches() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in CACHE_VARIABLES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: os.path.join(folder, name.lower()) for name in CACHE_VARIABLES})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _summary(kind: str, starts: list[Start]) -> dict[str, Any]:
    times = [start.seconds for start in starts]
    return {
        f"avg_{kind}_startup_time": fmean(times),
        f"{kind}_startup_times": times,
        f"{kind}_startup_percentiles": percentiles(times),
        f"{kind}_startup_phases": [start.phases for start in starts],
    }
