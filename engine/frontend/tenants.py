"""Marks requests as those of a tenant, who shares the engine with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from msgspec.structs import replace

from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.ipc.messages import TenantSpec


def of_tenant(requests: Iterable[PreparedRequest], tenant: TenantSpec | None) -> list[PreparedRequest]:
    """Return the requests as those of `tenant`; None: they wait for no turn."""
    return [
        dataclasses.replace(request, sequences=[replace(sequence, tenant=tenant) for sequence in request.sequences])
        if tenant is not None
        else request
        for request in requests
    ]
