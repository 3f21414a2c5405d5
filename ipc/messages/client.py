"""User process ⇄ coordinator."""

from __future__ import annotations

from typing import Literal

from sempre.ipc.messages.common import (
    Data,
    ErrorInfo,
    Heartbeat,
    LogprobRows,
    Message,
    NonNegative,
    Positive,
    Refused,
    SamplingSpec,
    TokenId,
    Uint64,
)


class ClientHello(Message, frozen=True, kw_only=True):
    """First command of a client."""

    protocol_version: int
    pid: int


class RequestSpec(Data, frozen=True, kw_only=True):
    """One sequence to generate. `seed` is the one in use; `priority` lower is sooner; `ordinal` breaks every tie."""

    request_id: str
    prompt_token_ids: list[TokenId]
    params: SamplingSpec
    seed: Uint64
    ordinal: NonNegative
    priority: int = 0
    cache_salt: str | None = None


class AddRequests(Message, frozen=True, kw_only=True):
    requests: list[RequestSpec]


class AbortRequests(Message, frozen=True, kw_only=True):
    """Unknown ids are ignored: the request may have finished meanwhile.

    `finish_reason` is what the requests count as: "stop" when the client has found a stop string.
    """

    request_ids: list[str]
    finish_reason: Literal["abort", "stop"] = "abort"


class CallWorkers(Message, frozen=True, kw_only=True):
    """Call one of the workers' public methods on every worker."""

    call_id: NonNegative
    method: str
    args: list[object] = []
    kwargs: dict[str, object] = {}


class ResetPrefixCache(Message, frozen=True, kw_only=True):
    call_id: NonNegative


class GetMetrics(Message, frozen=True, kw_only=True):
    call_id: NonNegative


class GetHealth(Message, frozen=True, kw_only=True):
    call_id: NonNegative


class ShutdownEngine(Message, frozen=True, kw_only=True):
    """End workers and coordinator; unfinished requests are dropped."""


ClientCommand = (
    ClientHello
    | AddRequests
    | AbortRequests
    | CallWorkers
    | ResetPrefixCache
    | GetMetrics
    | GetHealth
    | ShutdownEngine
    | Heartbeat
    | Refused
)


class StartupProgress(Message, frozen=True, kw_only=True):
    """A start-up phase has ended."""

    phase: str
    seconds: float


class EngineReady(Message, frozen=True, kw_only=True):
    """All workers are ready and seeded alike."""

    vocab_size: Positive
    max_model_len: Positive
    eos_token_ids: list[TokenId]
    num_blocks: Positive
    block_size: Positive
    world_size: Positive
    fingerprint: dict[str, str]
    phase_seconds: dict[str, float] = {}
    worker_pids: list[int] = []


class RequestOutputDelta(Data, frozen=True, kw_only=True):
    """What is new for one request since the last delta. `finish_reason`: stop, length, abort or error."""

    request_id: str
    token_ids: list[TokenId] = []
    logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: NonNegative = 0
    error: ErrorInfo | None = None


class OutputsReady(Message, frozen=True, kw_only=True):
    outputs: list[RequestOutputDelta]


class CallWorkersReply(Message, frozen=True, kw_only=True):
    """One result per worker, in rank order, or the first error."""

    call_id: NonNegative
    results: list[object] = []
    error: ErrorInfo | None = None


class ResetPrefixCacheReply(Message, frozen=True, kw_only=True):
    """`done` is False while requests hold blocks: nothing was reset."""

    call_id: NonNegative
    done: bool


class MetricsReply(Message, frozen=True, kw_only=True):
    """Counters and gauges by name; lists are per-replica values."""

    call_id: NonNegative
    values: dict[str, float | list[float] | dict[str, float]]


class WorkerHealth(Data, frozen=True, kw_only=True):
    """Seconds since the last sign of life of a rank, and since it was given the oldest step it has yet to answer."""

    rank: NonNegative
    silence_s: float
    step_age_s: float = 0.0


class HealthReply(Message, frozen=True, kw_only=True):
    """One entry per rank, in rank order."""

    call_id: NonNegative
    workers: list[WorkerHealth]


class EngineFailed(Message, frozen=True, kw_only=True):
    """The coordinator's last word."""

    error: ErrorInfo


ClientEvent = (
    StartupProgress
    | EngineReady
    | OutputsReady
    | CallWorkersReply
    | ResetPrefixCacheReply
    | MetricsReply
    | HealthReply
    | EngineFailed
    | Heartbeat
    | Refused
)
