"""Endpoints that load and unload adapters while the server runs, where its configuration allows that."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sempre.engine.server.body import read_model
from sempre.engine.server.errors import APIError, BadRequest
from sempre.engine.server.requests import LoadAdapterRequest, UnloadAdapterRequest
from sempre.engine.server.service import Service


async def load_lora_adapter(service: Service, http: Request) -> Response:
    """Load an adapter, which clients may then name as `model`."""
    _check_allowed(service)
    request = await read_model(http, LoadAdapterRequest, service)
    service.check_ready()
    await service.adapters.load(request.lora_name, request.lora_path, replace=request.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")


async def unload_lora_adapter(service: Service, http: Request) -> Response:
    """Forget an adapter."""
    _check_allowed(service)
    request = await read_model(http, UnloadAdapterRequest, service)
    service.check_ready()
    await service.adapters.unload(request.lora_name, request.lora_int_id)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


def _check_allowed(service: Service) -> None:
    if not service.config.allow_runtime_lora_updating:
        text = "Adapters cannot be changed: start the server with --allow-runtime-lora-updating."
        raise APIError(404, text)
    if not service.engine.config.enable_lora:
        raise BadRequest("No adapters are served: start the server with --enable-lora.")
