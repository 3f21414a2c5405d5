"""Sleeping over HTTP, by vLLM's paths. It needs --enable-sleep-mode, since any client can stop the engine for all."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sempre.engine.parameter_checks import shown
from sempre.engine.server.errors import APIError, BadRequest
from sempre.engine.server.service import Service

_WORDS = {"true": True, "1": True, "false": False, "0": False}


async def sleep(service: Service, http: Request) -> Response:
    """POST /sleep?level=1&mode=abort: give back memory until /wake_up; requests that come meanwhile wait."""
    _check(service, http, "level", "mode")
    query = http.query_params
    level = query.get("level", "1")
    if level not in ("0", "1", "2"):
        raise BadRequest(f"level must be 0, 1 or 2, got {shown(level)}.", param="level")
    mode: Any = query.get("mode", "abort")
    await service.engine.sleep(int(level), mode)
    return JSONResponse({"status": "sleeping", "level": int(level)})


async def wake_up(service: Service, http: Request) -> Response:
    """POST /wake_up?tags=weights&tags=kv_cache: take back memory; without tags all of it."""
    _check(service, http, "tags")
    tags: Any = http.query_params.getlist("tags")
    await service.engine.wake_up(tags or None)
    sleeps = await service.engine.is_sleeping()
    return JSONResponse({"status": "sleeping" if sleeps else "awake", "tags_woken": tags or None})


async def is_sleeping(service: Service, http: Request) -> Response:
    """GET /is_sleeping."""
    _check(service, http)
    return JSONResponse({"is_sleeping": await service.engine.is_sleeping()})


async def pause(service: Service, http: Request) -> Response:
    """POST /pause?mode=abort&clear_cache=true: compute nothing until /resume; requests that come meanwhile wait."""
    _check(service, http, "mode", "clear_cache", "wait_for_inflight_requests")
    mode: Any = http.query_params.get("mode", "abort")
    await service.engine.pause_generation(
        mode=mode,
        clear_cache=_flag(http, "clear_cache", default=True),
        wait_for_inflight_requests=_flag(http, "wait_for_inflight_requests", default=False),
    )
    return JSONResponse({"status": "paused"})


async def resume(service: Service, http: Request) -> Response:
    """POST /resume: compute again."""
    _check(service, http)
    await service.engine.resume_generation()
    return JSONResponse({"status": "resumed"})


async def is_paused(service: Service, http: Request) -> Response:
    """GET /is_paused."""
    _check(service, http)
    return JSONResponse({"is_paused": await service.engine.is_paused()})


def _check(service: Service, http: Request, *known: str) -> None:
    """Raise APIError where the server does not allow it, for an unknown parameter, and while the engine starts."""
    if not service.config.enable_sleep_mode:
        raise APIError(404, "The engine cannot be put to sleep: start the server with --enable-sleep-mode.")
    for name in http.query_params:
        if name not in known:
            raise BadRequest(f"{name} is no parameter of {http.url.path}.", param=name)
    service.check_ready()


def _flag(http: Request, name: str, *, default: bool) -> bool:
    text = http.query_params.get(name)
    if text is None:
        return default
    if text.lower() not in _WORDS:
        raise BadRequest(f"{name} must be true or false, got {shown(text)}.", param=name)
    return _WORDS[text.lower()]
