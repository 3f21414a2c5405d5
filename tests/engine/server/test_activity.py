"""The line about throughput, and what a start says about the address."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempre.engine.metrics import PREFIX, Counter, Gauge, Metric
from sempre.engine.server.activity import Activity, log_activity
from sempre.engine.server.config import server_config
from sempre.engine.server.run import is_open, page_address
from sempre.engine.server.service import Service


def metrics(replica: int, **values: float) -> list[Metric]:
    labels = {"engine": str(replica)}
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return [
        Gauge(name=PREFIX + name, labels=labels, value=value)
        if name in gauges
        else Counter(name=PREFIX + name, labels=labels, value=int(value))
        for name, value in values.items()
    ]


def test_rates_are_those_since_the_last_line_over_all_replicas() -> None:
    before = Activity.of(metrics(0, prompt_tokens=100, generation_tokens=50) + metrics(1, prompt_tokens=7), at=10.0)
    found = metrics(0, prompt_tokens=300, generation_tokens=90, num_requests_running=3, kv_cache_usage_perc=0.125)
    found += metrics(1, prompt_tokens=107, generation_tokens=60, num_requests_waiting=2, kv_cache_usage_perc=0.5)
    found.append(Gauge(name=PREFIX + "num_requests_waiting", labels={"engine": "1", "reason": "capacity"}, value=99))
    line = Activity.of(found, at=15.0).line_since(before)
    assert line == "20.0 output tok/s, 60.0 prompt tok/s, 3 running, 2 waiting, KV cache 50.0% in use"


def test_the_share_of_cached_tokens_is_told_where_prompts_came() -> None:
    before = Activity.of(metrics(0, prefix_cache_queries=100, prefix_cache_hits=90), at=0.0)
    after = Activity.of(metrics(0, prompt_tokens=200, prefix_cache_queries=300, prefix_cache_hits=140), at=10.0)
    line = after.line_since(before)
    assert line is not None
    assert line.endswith("25.0% of prompt tokens cached")


def test_an_idle_server_says_nothing_and_a_new_engine_counts_from_zero() -> None:
    busy = Activity.of(metrics(0, prompt_tokens=100, generation_tokens=50), at=0.0)
    assert Activity.of(metrics(0, prompt_tokens=100, generation_tokens=50), at=10.0).line_since(busy) is None
    assert Activity.of(metrics(0, prompt_tokens=0, generation_tokens=0), at=10.0).line_since(busy) is None
    line = Activity.of(metrics(0, num_requests_waiting=1), at=10.0).line_since(busy)
    assert line == "0.0 output tok/s, 0.0 prompt tok/s, 0 running, 1 waiting, KV cache 0.0% in use"


def test_lines_come_while_the_engine_works_and_none_while_it_is_away(caplog: pytest.LogCaptureFixture) -> None:
    reports = [metrics(0, generation_tokens=5), [], metrics(0, generation_tokens=5), metrics(0, generation_tokens=9)]
    asked = 0

    async def get_metrics() -> list[Metric]:
        nonlocal asked
        asked += 1
        return reports[min(asked, len(reports)) - 1]

    service = cast(Service, SimpleNamespace(is_ready=True, engine=SimpleNamespace(get_metrics=get_metrics)))

    async def run() -> None:
        task = asyncio.create_task(log_activity(service, 0.01))
        while asked < 6:
            await asyncio.sleep(0.01)
        task.cancel()

    with caplog.at_level("INFO", logger="sempre.engine.server.activity"):
        asyncio.run(run())
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("settings", "open_to_all"),
    [
        ({}, True),
        ({"host": "::"}, True),
        ({"host": "192.168.0.7"}, True),
        ({"host": "server.example"}, True),
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"uds": "/run/sempre.sock"}, False),
        ({"api_key": ["k"]}, False),
        ({"api_key_file": "/keys"}, False),
    ],
)
def test_a_server_open_to_all_is_recognised(settings: dict[str, Any], open_to_all: bool) -> None:
    assert is_open(server_config(settings)) is open_to_all


@pytest.mark.parametrize(
    ("settings", "address", "page"),
    [
        ({}, "http://0.0.0.0:8000", "http://127.0.0.1:8000/"),
        ({"host": "::"}, "https://:::8443", "https://[::1]:8443/"),
        ({"host": "::1"}, "http://::1:8000", "http://[::1]:8000/"),
        ({"host": "host.example", "root_path": "/llm/"}, "http://host.example:80", "http://host.example:80/llm/"),
        ({"uds": "/run/sempre.sock"}, "/run/sempre.sock", None),
    ],
)
def test_the_address_of_the_page_is_one_that_a_browser_can_open(
    settings: dict[str, Any], address: str, page: str | None
) -> None:
    assert page_address(server_config(settings), address) == page
