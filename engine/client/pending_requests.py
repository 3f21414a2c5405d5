"""Unanswered requests and calls, with which another coordinator can continue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    AdmitClient,
    CallWorkers,
    CallWorkersReply,
    ClientCommand,
    ClientEvent,
    DropClient,
    GetHealth,
    GetMetrics,
    GetSleepState,
    HealthReply,
    MetricsReply,
    OutputsReady,
    PauseRequests,
    RequestSpec,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    ResumeRequests,
    SleepEngine,
    SleepReply,
    SleepTag,
    UpdateWeights,
    UpdateWeightsReply,
    WakeEngine,
)

# Requests are sent in frames of about this size, so that the first ones run while the last ones are sent.
FRAME_BYTES = 1 << 20

# the number of no call of a client
_NO_CALL = (1 << 62) - 1

Call = (
    CallWorkers | GetHealth | GetMetrics | ResetPrefixCache | UpdateWeights | SleepEngine | WakeEngine | GetSleepState
)
Reply = CallWorkersReply | HealthReply | MetricsReply | ResetPrefixCacheReply | UpdateWeightsReply | SleepReply
_ANSWERS: dict[type[Reply], tuple[type[Call], ...]] = {
    CallWorkersReply: (CallWorkers,),
    HealthReply: (GetHealth,),
    MetricsReply: (GetMetrics,),
    ResetPrefixCacheReply: (ResetPrefixCache,),
    UpdateWeightsReply: (UpdateWeights,),
    SleepReply: (SleepEngine, WakeEngine, GetSleepState),
}


@dataclass(slots=True)
class _Entry:
    """One unfinished sequence and the part the client has received."""

    spec: RequestSpec
    token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    is_paused: bool = False


class PendingRequests:
    """The unfinished requests with their tokens so far, the calls without an answer, and further clients."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._calls: list[Call] = []
        self._asleep: list[SleepTag] = []
        self._admitted: dict[int, None] = {}

    @property
    def num_unfinished(self) -> int:
        """Number of unfinished sequences."""
        return len(self._entries)

    def sent(self, command: ClientCommand) -> None:
        """Record a command to the coordinator."""
        match command:
            case AddRequests(requests=specs):
                # the coordinator refuses an id in use; the first request with it continues
                self._entries.update({s.request_id: _Entry(s) for s in specs if s.request_id not in self._entries})
            case AbortRequests(request_ids=request_ids):
                for request_id in request_ids:
                    self._entries.pop(request_id, None)
            case PauseRequests(request_ids=request_ids) | ResumeRequests(request_ids=request_ids):
                for request_id in request_ids:
                    if request_id in self._entries:
                        self._entries[request_id].is_paused = isinstance(command, PauseRequests)
            case _ if isinstance(command, Call):
                self._calls.append(command)
            case AdmitClient(pid=pid):
                self._admitted[pid] = None
            case DropClient(pid=pid):
                self._admitted.pop(pid, None)

    def received(self, event: ClientEvent) -> None:
        """Record an event from the coordinator."""
        match event:
            case OutputsReady(outputs=deltas):
                for delta in deltas:
                    entry = self._entries.get(delta.request_id)
                    if entry is None:
                        continue
                    if delta.finish_reason is not None:
                        del self._entries[delta.request_id]
                        continue
                    entry.token_ids += delta.token_ids
                    if delta.prompt_logprobs is not None:
                        entry.num_prompt_logprobs += delta.prompt_logprobs.num_rows
            case _ if isinstance(event, Reply):
                if isinstance(event, SleepReply) and event.error is None:
                    self._asleep = event.tags
                answered = self.call_of(event)
                if answered is not None:
                    self._calls.remove(answered)

    def call_of(self, reply: Reply) -> Call | None:
        """The call that this answers."""
        kinds = _ANSWERS[type(reply)]
        return next((call for call in self._calls if type(call) in kinds and call.call_id == reply.call_id), None)

    def commands(self) -> Iterator[ClientCommand]:
        """Commands for another coordinator to continue where the last one ended."""
        if self._asleep:
            # nobody waits for this answer
            yield SleepEngine(call_id=_NO_CALL, tags=self._asleep, mode="keep")
        for frame in frames(_resumed(entry) for entry in self._entries.values()):
            yield AddRequests(requests=frame)
        paused = [request_id for request_id, entry in self._entries.items() if entry.is_paused]
        if paused:
            yield PauseRequests(request_ids=paused)
        yield from self._calls
        for pid in self._admitted:
            yield AdmitClient(pid=pid)


def frames(specs: Iterable[RequestSpec]) -> Iterator[list[RequestSpec]]:
    """Yield the specs in order, in lists of about FRAME_BYTES each."""
    frame: list[RequestSpec] = []
    size = 0
    for spec in specs:
        frame.append(spec)
        size += _estimated_bytes(spec)
        if size >= FRAME_BYTES:
            yield frame
            frame, size = [], 0
    if frame:
        yield frame


def _resumed(entry: _Entry) -> RequestSpec:
    delivered = entry.num_prompt_logprobs
    return replace(entry.spec, output_token_ids=entry.token_ids, num_prompt_logprobs_delivered=delivered)


def _estimated_bytes(spec: RequestSpec) -> int:
    """Roughly the packed size: five bytes per token id, nine more per float."""
    params = spec.params
    num_ids = len(spec.prompt_token_ids) + len(spec.output_token_ids)
    num_ids += len(params.allowed_token_ids or []) + 3 * len(params.logit_bias)
    packed = 0 if params.prompt_candidates is None else len(params.prompt_candidates.token_ids)
    return 256 + packed + 5 * (num_ids + sum(map(len, params.bad_words_token_ids)))
