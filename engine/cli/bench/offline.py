"""Latency, throughput and start-up of an engine, with requests of random token ids."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

from sempre.engine.arguments import engine_config
from sempre.engine.client import EngineClient, launch
from sempre.ipc.config import EngineConfig
from sempre.ipc.error_info import restore
from sempre.ipc.errors import ConfigError, EngineDeadError, RequestError
from sempre.ipc.messages import AddRequests, OutputsReady, RequestSpec, SamplingSpec

# folders of compiled kernels for CPU and GPU
CACHE_VARIABLES = ("SEMPRE_CACHE", "TRITON_CACHE_DIR")


def startup(
    model: str, keywords: dict[str, Any], *, num_iters_cold: int, num_iters_warmup: int, num_iters_warm: int
) -> dict[str, Any]:
    """Seconds until an engine is ready, with an empty and with a filled kernel cache.

    Each start uses new processes. Raises ConfigError without multiprocessing: kernels would stay in memory.
    """
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
    """Seconds until an engine was ready, in total and per phase, as named by `/server_info`."""

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


def throughput(
    model: str, keywords: dict[str, Any], *, input_len: int, output_len: int, n: int, num_prompts: int
) -> dict[str, Any]:
    """Requests and tokens (of prompts and outputs) per second if all requests are sent at once."""
    config = engine_config(model, **keywords)
    client = launch(config)
    try:
        requests = random_requests(
            num_prompts,
            vocab_size=client.ready.vocab_size,
            input_len=input_len,
            output_len=output_len,
            n=n,
            seed=config.seed,
        )
        elapsed = seconds_for(client, requests)
    finally:
        client.close()
    total = num_prompts * (input_len + n * output_len)
    return {
        "elapsed_time": elapsed,
        "num_requests": num_prompts,
        "total_num_tokens": total,
        "requests_per_second": num_prompts / elapsed,
        "tokens_per_second": total / elapsed,
    }


def latency(
    model: str,
    keywords: dict[str, Any],
    *,
    batch_size: int,
    n: int,
    num_iters_warmup: int,
    num_iters: int,
    **lengths: int,
) -> dict[str, Any]:
    """Seconds of one batch of requests, with new prompts in every run, so the prefix cache does not help.

    `lengths` are input_len and output_len.
    """
    config = engine_config(model, **keywords)
    client = launch(config)
    try:
        latencies = []
        for run in range(num_iters_warmup + num_iters):
            requests = random_requests(
                batch_size,
                vocab_size=client.ready.vocab_size,
                **lengths,
                n=n,
                seed=config.seed,
                first=run * batch_size * n,
            )
            latencies.append(seconds_for(client, requests))
    finally:
        client.close()
    counted = latencies[num_iters_warmup:]
    return {"avg_latency": fmean(counted), "latencies": counted, "percentiles": percentiles(counted)}


_PATIENCE_S = 600.0


def random_requests(
    count: int, *, vocab_size: int, input_len: int, output_len: int, n: int, seed: int, first: int = 0
) -> list[RequestSpec]:
    """Make `count` prompts, each `n` times with different seeds and ignore_eos; ordinals start at `first`."""
    generator = random.Random(f"{seed} {first}")
    specs: list[RequestSpec] = []
    for _ in range(count):
        prompt = [generator.randrange(vocab_size) for _ in range(input_len)]
        for _ in range(n):
            ordinal = first + len(specs)
            params = SamplingSpec(max_tokens=output_len)
            specs.append(
                RequestSpec(
                    request_id=str(ordinal), prompt_token_ids=prompt, params=params, seed=ordinal, ordinal=ordinal
                )
            )
    return specs


def seconds_for(client: EngineClient, requests: list[RequestSpec]) -> float:
    """Wall-clock seconds from sending all requests until the last has ended. Raises the error of a failed one."""
    began = time.perf_counter()
    client.send(AddRequests(requests=requests))
    unfinished = len(requests)
    while unfinished:
        event = client.receive(_PATIENCE_S)
        if event is None:
            raise EngineDeadError(f"{unfinished} requests have made no progress for {_PATIENCE_S:g} s")
        if isinstance(event, OutputsReady):
            for delta in event.outputs:
                if delta.error is not None:
                    raise restore(delta.error) or RequestError(delta.error.message, request_id=delta.request_id)
                unfinished -= delta.finish_reason is not None
    return time.perf_counter() - began


def percentiles(values: list[float]) -> dict[str, float]:
    """Percentiles of a sample, with linear interpolation."""
    ordered = sorted(values)
    result = {}
    for percent in (10, 25, 50, 75, 90, 99):
        at = (len(ordered) - 1) * percent / 100
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        result[str(percent)] = ordered[low] + (ordered[high] - ordered[low]) * (at - low)
    return result
