"""The clients of one coordinator: its owner, which has started it, and processes that the owner has let in.

    owner ── ClientHello, AdmitClient(pid), …, DropClient(pid)      every command; events of the engine itself
    other ── ClientHello ── EngineReady ── requests and questions   only the answers to its own

Ids of requests are unique among all clients; ids of calls only within one, so they are replaced on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from msgspec.structs import replace

from sempre.ipc.errors import MessageMalformed
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
    RequestOutputDelta,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    ResumeRequests,
    ShutdownEngine,
    SleepEngine,
    SleepReply,
    UpdateWeights,
    UpdateWeightsReply,
    WakeEngine,
)

Addressed = tuple[bytes, ClientEvent]
_Change = UpdateWeights | SleepEngine | WakeEngine
_Call = CallWorkers | GetHealth | GetMetrics | GetSleepState | ResetPrefixCache | _Change
_Reply = CallWorkersReply | HealthReply | MetricsReply | ResetPrefixCacheReply | SleepReply | UpdateWeightsReply
# what concerns the requests of all
_OF_OWNER = AdmitClient | DropClient | ShutdownEngine | _Change


@dataclass(slots=True)
class _Client:
    """One client: its unfinished requests, those it has paused, and those that wait until it has read more."""

    pid: int
    request_ids: dict[str, None] = field(default_factory=dict)
    paused: dict[str, None] = field(default_factory=dict)
    held: dict[str, None] = field(default_factory=dict)


class Clients:
    """Who has sent what, so that each event goes to the client that it is for."""

    def __init__(self, owner_pid: int) -> None:
        self.owner: bytes | None = None
        self._owner_pid = owner_pid
        self._clients: dict[bytes, _Client] = {}
        self._admitted: dict[int, None] = {}
        self._of_request: dict[str, bytes] = {}
        self._calls: dict[int, tuple[bytes, int]] = {}
        self._call_ids = count()
        self._ordinals = count()

    def __contains__(self, identity: bytes) -> bool:
        return identity == self.owner or identity in self._clients

    @property
    def others(self) -> list[bytes]:
        """The clients beside the owner."""
        return list(self._clients)

    def welcome(self, identity: bytes, pid: int) -> None:
        """Take a client whose hello was valid. Raises MessageMalformed for one that nobody has announced."""
        if pid == self._owner_pid:
            if self.owner is not None:
                raise MessageMalformed("ClientHello: expected one owner, found a second", field="tag")
            self.owner = identity
        elif pid in self._admitted:
            del self._admitted[pid]
            self._clients[identity] = _Client(pid)
        else:
            known = ", ".join(map(str, [self._owner_pid, *self._admitted]))
            raise MessageMalformed(f"ClientHello.pid: expected {known}, found {pid}", field="ClientHello.pid")

    def admit(self, pid: int) -> None:
        """A process that the owner has started may connect."""
        self._admitted[pid] = None

    def drop(self, pid: int) -> tuple[bytes | None, AbortRequests]:
        """A process has ended: forget it; return its identity and the command that ends its requests."""
        self._admitted.pop(pid, None)
        found = [identity for identity, client in self._clients.items() if client.pid == pid]
        if not found:
            return None, AbortRequests(request_ids=[])
        [identity] = found
        request_ids = list(self._clients.pop(identity).request_ids)
        for request_id in request_ids:
            del self._of_request[request_id]
        return identity, AbortRequests(request_ids=request_ids)

    def taken(self, identity: bytes, command: ClientCommand) -> ClientCommand:
        """Record a client's command, and return it as the core takes it. Raises MessageMalformed for one that only the
        owner may send, or that names a request of another client."""
        if isinstance(command, _Call):
            call_id = next(self._call_ids)
            self._calls[call_id] = identity, command.call_id
            command = replace(command, call_id=call_id)
        if identity == self.owner:
            return command
        if isinstance(command, _OF_OWNER):
            name = type(command).__name__
            raise MessageMalformed(f"{name}: expected it from the owner of the engine alone", field="tag")
        client = self._clients[identity]
        match command:
            case AddRequests(requests=specs):
                self._check_own(identity, (spec.request_id for spec in specs))
                for spec in specs:
                    self._of_request[spec.request_id] = identity
                    client.request_ids[spec.request_id] = None
                # the order of arrival, whichever client it was
                return AddRequests(requests=[replace(spec, ordinal=next(self._ordinals)) for spec in specs])
            case AbortRequests(request_ids=request_ids):
                self._check_own(identity, request_ids)
            case PauseRequests(request_ids=request_ids):
                self._check_own(identity, request_ids)
                client.paused.update(dict.fromkeys(request_ids))
            case ResumeRequests(request_ids=request_ids):
                self._check_own(identity, request_ids)
                for request_id in request_ids:
                    client.paused.pop(request_id, None)
                return ResumeRequests(request_ids=[each for each in request_ids if each not in client.held])
            case _:
                pass
        return command

    def _check_own(self, identity: bytes, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            # unknown ones have ended already, or are new
            if self._of_request.get(request_id, identity) != identity:
                raise MessageMalformed(
                    f"request_ids: expected ids of this client, found {request_id!r} of another", field="request_ids"
                )

    def addressed(self, event: ClientEvent) -> list[Addressed]:
        """Return the event, in parts, with the clients that get it; what concerns no other is for the owner."""
        match event:
            case OutputsReady(outputs=outputs) if self._clients:
                return [(who, OutputsReady(outputs=part)) for who, part in self._parts(outputs).items()]
            case _ if isinstance(event, _Reply):
                identity, call_id = self._calls.pop(event.call_id)
                return [(identity, replace(event, call_id=call_id))] if identity in self else []
            case _:
                return [] if self.owner is None else [(self.owner, event)]

    def _parts(self, outputs: list[RequestOutputDelta]) -> dict[bytes, list[RequestOutputDelta]]:
        parts: dict[bytes, list[RequestOutputDelta]] = {}
        for output in outputs:
            identity = self._of_request.get(output.request_id, self.owner)
            if identity is None:
                continue
            parts.setdefault(identity, []).append(output)
            if output.finish_reason is not None and identity != self.owner:
                self._of_request.pop(output.request_id)
                client = self._clients[identity]
                for requests in (client.request_ids, client.paused, client.held):
                    requests.pop(output.request_id, None)
        return parts

    def hold(self, identity: bytes) -> PauseRequests | None:
        """The client is behind with reading: return the command with which its requests wait, unless they do."""
        client = self._clients[identity]
        new = [request_id for request_id in client.request_ids if request_id not in client.held]
        client.held.update(dict.fromkeys(new))
        return PauseRequests(request_ids=new) if new else None

    def let_go(self, identity: bytes) -> ResumeRequests | None:
        """It has read enough: return the command with which its requests go on, unless they do."""
        client = self._clients[identity]
        held, client.held = client.held, {}
        return ResumeRequests(request_ids=[each for each in held if each not in client.paused]) if held else None
