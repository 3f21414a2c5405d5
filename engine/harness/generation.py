"""Requests as token ids, and their results including the bits of each log-probability."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sempre.engine.client import EngineClient
from sempre.ipc.error_info import restore
from sempre.ipc.errors import ProtocolError, RequestError, SempreError
from sempre.ipc.messages import AddRequests, LogprobRows, OutputsReady, RequestOutputDelta, RequestSpec, SamplingSpec


class PositionLogprobs(NamedTuple):
    """One position: the token in question first, then the best ones; `bits` are float32 patterns."""

    token_ids: tuple[int, ...]
    bits: tuple[int, ...]
    rank: int


@dataclass
class Generation:
    """The result of one request."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    candidate_bits: list[int] = field(default_factory=list)
    """float32 patterns of the log-probabilities of the prompt's candidates"""


@dataclass
class Outcome:
    """How a request ended: with its result, or with an error and what arrived before it."""

    generation: Generation
    error: SempreError | TimeoutError | None = None

    def result(self) -> Generation:
        """Raises the error."""
        if self.error is not None:
            raise self.error
        return self.generation


def make_request(
    prompt_token_ids: Sequence[int],
    *,
    seed: int = 0,
    ordinal: int = 0,
    request_id: str | None = None,
    priority: int = 0,
    cache_salt: str | None = None,
    max_tokens: int = 16,
    **sampling: Any,
) -> RequestSpec:
    """Make a request; `sampling` are further fields of SamplingSpec. The id defaults to the ordinal."""
    return RequestSpec(
        request_id=str(ordinal) if request_id is None else request_id,
        prompt_token_ids=list(prompt_token_ids),
        params=SamplingSpec(max_tokens=max_tokens, **sampling),
        seed=seed,
        ordinal=ordinal,
        priority=priority,
        cache_salt=cache_salt,
    )


def generate(client: EngineClient, requests: Sequence[RequestSpec], *, timeout_s: float = 120.0) -> list[Generation]:
    """Run all requests at once; return results in their order.

    Raises RequestError for a failed request, TimeoutError, and the errors of `client.receive`.
    """
    found = _started(client, requests)
    for _ in _events_taken(client, found, timeout_s):
        for outcome in found.values():
            outcome.result()
    return [outcome.result() for outcome in found.values()]


def outcomes(client: EngineClient, requests: Sequence[RequestSpec], *, timeout_s: float = 120.0) -> list[Outcome]:
    """Run all requests at once; return how each ended, in their order. Raises nothing for those that failed."""
    found = _started(client, requests)
    for _ in _events_taken(client, found, timeout_s):
        pass
    return list(found.values())


def _started(client: EngineClient, requests: Sequence[RequestSpec]) -> dict[str, Outcome]:
    client.send(AddRequests(requests=list(requests)))
    return {spec.request_id: Outcome(Generation(spec.request_id)) for spec in requests}


def _events_taken(client: EngineClient, found: Mapping[str, Outcome], timeout_s: float) -> Iterator[None]:
    """Complete what was `found`; yields after each event of the engine. An error of the engine is that of all
    unfinished requests."""
    unfinished = dict(found)
    deadline = time.monotonic() + timeout_s
    while unfinished:
        try:
            event = client.receive(max(0.0, deadline - time.monotonic()))
            if event is None:
                raise TimeoutError(f"{len(unfinished)} of {len(found)} requests unfinished after {timeout_s:g} s")
        except (SempreError, TimeoutError) as error:
            for outcome in unfinished.values():
                outcome.error = error
            return
        for delta in event.outputs if isinstance(event, OutputsReady) else ():
            # unfinished requests of an earlier, failed call may still report
            if delta.request_id in found:
                _take(delta, found[delta.request_id], unfinished)
        yield


def _take(delta: RequestOutputDelta, outcome: Outcome, unfinished: dict[str, Outcome]) -> None:
    if delta.request_id not in unfinished:
        outcome.error = ProtocolError(f"request {delta.request_id!r}: an output arrived after its end")
        return
    try:
        apply_delta(outcome.generation, delta)
    except SempreError as error:
        outcome.error = error
    if delta.finish_reason is not None:
        del unfinished[delta.request_id]


def apply_delta(result: Generation, delta: RequestOutputDelta) -> None:
    """Add what is new for a request. Raises RequestError if it failed."""
    if delta.error is not None:
        text = f"request {delta.request_id!r} failed: {delta.error.type}: {delta.error.message}"
        raise restore(delta.error) or RequestError(text, request_id=delta.request_id)
    result.token_ids += delta.token_ids
    result.logprobs += _positions(delta.logprobs)
    result.prompt_logprobs += _positions(delta.prompt_logprobs)
    packed = b"" if delta.prompt_logprobs is None else delta.prompt_logprobs.candidates
    result.candidate_bits += struct.unpack(f"<{len(packed) // 4}I", packed)
    result.finish_reason = delta.finish_reason
    result.stop_reason = delta.stop_reason
    result.num_cached_tokens += delta.num_cached_tokens


def _positions(rows: LogprobRows | None) -> list[PositionLogprobs]:
    if rows is None:
        return []
    count = rows.num_rows * rows.width
    token_ids = struct.unpack(f"<{count}i", rows.token_ids)
    bits = struct.unpack(f"<{count}I", rows.logprobs)
    ranks = struct.unpack(f"<{rows.num_rows}i", rows.ranks)
    columns = [slice(row * rows.width, (row + 1) * rows.width) for row in range(rows.num_rows)]
    return [PositionLogprobs(token_ids[at], bits[at], rank) for at, rank in zip(columns, ranks, strict=True)]
