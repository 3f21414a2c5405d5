"""How busy the server is: /metrics, /load, and a response header for load balancers."""

from __future__ import annotations

import asyncio
import logging
from statistics import fmean
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sempre.engine.metrics import PREFIX, Counter, Gauge, Metric
from sempre.engine.server.metrics import CONTENT_TYPE
from sempre.engine.server.service import Service
from sempre.ipc.errors import EngineDeadError

logger = logging.getLogger(__name__)

_FIGURES_S = 2.0
# Open Request Cost Aggregation: the request header that asks for the load, and the response header with it
_FORMAT_HEADER, _LOAD_HEADER = "endpoint-load-metrics-format", "endpoint-load-metrics"
_SHOWN = 40


async def load(service: Service, _request: Request) -> Response:
    """Return how many requests are being answered, the tokens generated since the start, and each replica's gauges."""
    service.check_ready()
    admission = service.admission
    engine = await engine_metrics(service)
    generated = [one.value for one in engine if isinstance(one, Counter) and one.name == f"{PREFIX}generation_tokens"]
    return JSONResponse(
        {
            "server_load": service.num_requests_in_all,
            "num_sequences": admission.num_sequences,
            "capacity": admission.capacity,
            # null while the engine is unavailable
            "generation_tokens": sum(generated) if generated else None,
            **_gauges(engine),
        }
    )


async def metrics(service: Service, _request: Request) -> Response:
    """Return all metrics in Prometheus's text format."""
    engine = await engine_metrics(service)
    rejected = service.admission.num_rejected
    prefix = service.config.metrics_prefix
    text = service.metrics.exposition(
        engine, _cache_configs(service), clients=service.keys.clients, num_rejected=rejected, prefix=prefix
    )
    return Response(text, media_type=CONTENT_TYPE)


async def load_header(service: Service, http: Request) -> dict[str, str]:
    """Return the header with the load, in the format that the request's header names (TEXT or JSON)."""
    asked = http.headers.get(_FORMAT_HEADER)
    if asked is None:
        return {}
    if asked.upper() not in ("TEXT", "JSON"):
        logger.warning("%s: expected TEXT or JSON, found %r", _FORMAT_HEADER, asked[:_SHOWN])
        return {}
    gauges = _gauges(await engine_metrics(service))
    if not gauges:
        return {}
    named = {
        "kv_cache_usage_perc": fmean(gauges["kv_cache_usage_perc"]),
        "num_requests_waiting": sum(gauges["num_requests_waiting"]),
    }
    if asked.upper() == "JSON":
        return {_LOAD_HEADER: f"JSON {msgspec.json.encode({'named_metrics': named}).decode()}"}
    return {_LOAD_HEADER: "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())}


def _gauges(engine: list[Metric]) -> dict[str, Any]:
    """Return the values of each gauge, one per replica."""
    gauges: dict[str, Any] = {}
    for metric in engine:
        if isinstance(metric, Gauge) and "reason" not in metric.labels:
            gauges.setdefault(metric.name.removeprefix(PREFIX), []).append(metric.value)
    return gauges


async def engine_metrics(service: Service) -> list[Metric]:
    """Return the engine's metrics; none while it starts or restarts."""
    if not service.is_ready:
        return []
    try:
        async with asyncio.timeout(_FIGURES_S):
            return await service.engine.get_metrics()
    except (TimeoutError, EngineDeadError):
        return []


def _cache_configs(service: Service) -> list[dict[str, object]]:
    """Return the layout of each replica's KV cache, under vLLM's labels; none while the engine starts."""
    if not service.is_ready:
        return []
    ready, config = service.engine.ready, service.engine.config
    layout = {
        "block_size": ready.block_size,
        "cache_dtype": config.kv_cache_dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "kv_cache_size_tokens": ready.num_blocks * ready.block_size,
        # vLLM's label name, on every device
        "num_gpu_blocks": ready.num_blocks,
        "num_gpu_blocks_override": None,
    }
    return [{"engine": replica, **layout} for replica in range(config.data_parallel_size)]
