"""Receipts over HTTP: a request with the header `X-Sempre-Receipt: 1` gets one with each choice."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from sempre.engine.outputs import CompletionOutput
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.service import Service

HEADER = "x-sempre-receipt"
_ASKED = {"1": True, "0": False}


async def asks_for_receipts(service: Service, http: Request, *, searches: bool) -> bool:
    """Return whether the request asks for receipts; hash the model's files if it is the first. `searches`: it is a beam
    search, which cannot ask for them. Raises BadRequest for another value of the header.
    """
    value = http.headers.get(HEADER, "0").strip()
    if value not in _ASKED:
        raise BadRequest(f"The header X-Sempre-Receipt must be 0 or 1, got {value!r}.")
    if not _ASKED[value]:
        return False
    if searches:
        raise BadRequest("Beams have receipts if the server records all (--record): leave out X-Sempre-Receipt.")
    await service.offload.written(service.engine.prepare_receipts)
    return True


def receipt_of(choice: CompletionOutput) -> msgspec.Raw | UnsetType:
    """Return the receipt of a choice that has ended, an object in the response."""
    return UNSET if choice.receipt is None else msgspec.Raw(choice.receipt.encode())
