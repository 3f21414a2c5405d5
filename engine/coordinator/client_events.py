"""Makes events for clients."""

from __future__ import annotations

from sempre.ipc.error_info import describe
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import ClientEvent, EngineNotice, OutputsReady, RequestOutputDelta, RequestSpec


def outputs_of(deltas: list[RequestOutputDelta | None]) -> list[ClientEvent]:
    """Return one event with the deltas that are some; none without any."""
    outputs = [delta for delta in deltas if delta is not None]
    return [OutputsReady(outputs=outputs)] if outputs else []


def notices_of(texts: list[str]) -> list[ClientEvent]:
    """Return a notice for each text."""
    return [EngineNotice(message=text) for text in texts]


def refused(spec: RequestSpec, error: RequestError) -> RequestOutputDelta:
    """Return the end of a request that cannot begin."""
    return RequestOutputDelta(request_id=spec.request_id, finish_reason="error", error=describe(error))


def in_use(spec: RequestSpec) -> RequestError:
    """Return the error of a request whose id belongs to another one."""
    return RequestError(
        f"request id {spec.request_id!r} is in use by an unfinished request",
        parameter="request_id",
        value=spec.request_id,
        request_id=spec.request_id,
    )
