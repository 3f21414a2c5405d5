"""Sends a large call to the engine in parts, so that other requests are not blocked.

The engine serves requests in order of arrival, so a call of many sequences would make all later requests wait until
its last sequence has started. Instead, each part is sent when earlier ones have progressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sempre.engine.client.pending_requests import frames
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.ipc.messages import AddRequests, EngineReady, RequestOutputDelta, RequestSpec

Send = Callable[[AddRequests], None]

# fraction of a step's slots reserved for others
_SHARE_FOR_OTHERS = 8
# one step runs while the next one waits
_STEPS_AHEAD = 2
# for a sequence whose sibling has computed the prompt: tokens outside whole blocks of the prefix cache
_SIBLING_TOKENS = 16


class Pace(NamedTuple):
    """How much of one call the engine may hold at a time."""

    max_sequences: int
    max_prompt_tokens: int
    """of sequences without a token so far; a longer prompt is sent alone"""

    @classmethod
    def of(cls, ready: EngineReady, num_replicas: int) -> Pace:
        """Leave some slots of a step to others, and stay at most one step ahead."""
        places = ready.max_num_seqs - ready.max_num_seqs // _SHARE_FOR_OTHERS
        return cls(places * num_replicas, _STEPS_AHEAD * ready.max_num_batched_tokens * num_replicas)


class Pacer:
    """The calls that are not fully sent to the engine."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}
        """by sequence, sent or not"""

    def start(self, requests: Sequence[PreparedRequest], pace: Pace, send: Send) -> None:
        """Send the first sequences of a call, and more of them whenever `note` and `drop` make room."""
        call = _Call(requests, pace, send)
        call.send_more()
        if call.held:
            self._calls.update(dict.fromkeys(call.names(), call))

    def note(self, deltas: Iterable[RequestOutputDelta]) -> None:
        """Update progress from the engine's deltas."""
        if not self._calls:
            return
        touched: dict[_Call, None] = {}
        for delta in deltas:
            call = self._calls.get(delta.request_id)
            if call is None:
                continue
            if delta.token_ids:
                call.begun(delta.request_id)
            if delta.finish_reason is not None:
                call.end(delta.request_id)
                del self._calls[delta.request_id]
            touched[call] = None
        self._send_more(touched)

    def drop(self, sequence_ids: Iterable[str]) -> None:
        """Forget sequences that are no longer needed."""
        touched: dict[_Call, None] = {}
        for name in sequence_ids:
            call = self._calls.pop(name, None)
            if call is not None:
                call.end(name)
                touched[call] = None
        self._send_more(touched)

    def send_all(self) -> None:
        """Send all sequences that wait, whether or not there is room for them."""
        calls = dict.fromkeys(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.send_all()

    def _send_more(self, calls: Iterable[_Call]) -> None:
        for call in calls:
            call.send_more()
            if not call.held:
                for name in call.names():
                    self._calls.pop(name, None)


class _Call:
    """The unfinished sequences of one call."""

    def __init__(self, requests: Sequence[PreparedRequest], pace: Pace, send: Send) -> None:
        self._pace = pace
        self._send = send
        self.held: dict[str, tuple[RequestSpec, int]] = {
            spec.request_id: (spec, _SIBLING_TOKENS if place else len(spec.prompt_token_ids))
            for request in requests
            for place, spec in enumerate(request.sequences)
        }
        """not sent: tokens to compute before the first is sampled, by name"""
        self._sent: dict[str, int] = {}
        """sent: tokens still to compute before the first is sampled, by name"""
        self._num_waiting_tokens = 0

    def names(self) -> list[str]:
        return [*self._sent, *self.held]

    def begun(self, name: str) -> None:
        """The prompt has been computed."""
        if self._sent.get(name):
            self._num_waiting_tokens -= self._sent[name]
            self._sent[name] = 0

    def end(self, name: str) -> None:
        self.begun(name)
        self._sent.pop(name, None)
        self.held.pop(name, None)

    def send_all(self) -> None:
        """Send all sequences that were not sent."""
        held, self.held = self.held, {}
        for frame in frames(spec for spec, _ in held.values()):
            self._send(AddRequests(requests=frame))

    def send_more(self) -> None:
        """Send as many sequences as there is room for, in order."""
        fitting: list[RequestSpec] = []
        for name, (spec, num_tokens) in self.held.items():
            is_full = len(self._sent) >= self._pace.max_sequences
            too_many = self._num_waiting_tokens + num_tokens > self._pace.max_prompt_tokens
            if is_full or (too_many and self._num_waiting_tokens):
                break
            self._sent[name] = num_tokens
            self._num_waiting_tokens += num_tokens
            fitting.append(spec)
        for spec in fitting:
            del self.held[spec.request_id]
        for frame in frames(fitting):
            self._send(AddRequests(requests=frame))
