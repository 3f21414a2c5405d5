"""Links between workers of one replica on several hosts: parts of frames from rank to rank, in order.

Each rank has one socket that the others connect to, with CURVE. Whoever holds which key decides who has sent a frame,
and the sender numbers its frames to each receiver, so that a frame that is lost, repeated or late is an error.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Self

import zmq

from sempre.ipc.channel import configure, listen, remaining_ms
from sempre.ipc.curve import ClientKeys, Gate
from sempre.ipc.endpoint import tcp_endpoint
from sempre.ipc.errors import EngineUnhealthy, ProtocolError, StartupError
from sempre.ipc.key_pairs import WorkerKeys

_NUMBER = struct.Struct("<Q")
_LIMIT_BYTES = 1 << 30
_LOOK_S = 0.2


class RankLinks:
    """Those of one rank; used by one thread."""

    def __init__(self, rank: int, host: str, keys: WorkerKeys, gate: Gate) -> None:
        """Listens on a free port of the address `host`, from now on. Raises ProtocolError."""
        self._rank = rank
        self._keys = keys
        self._rank_of = {key: peer for peer, key in keys.peers.items()}
        domain = f"rank-{rank}"
        for key in keys.peers.values():
            gate.allow(domain, key)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        configure(self._socket, _LIMIT_BYTES)
        gate.secure(self._socket, domain, keys.own)
        self._outgoing: dict[int, zmq.Socket[bytes]] = {}
        self._sent = dict.fromkeys(keys.peers, 0)
        self._received = dict.fromkeys(keys.peers, 0)
        self._waiting: dict[int, deque[list[bytes]]] = {peer: deque() for peer in keys.peers}
        try:
            self.address = listen(self._socket, tcp_endpoint(host, "*"))
        except zmq.ZMQError as error:
            self.close()
            raise ProtocolError(f"rank {rank}: cannot listen on {host}: {error}") from error

    def connect(self, addresses: Mapping[int, str]) -> Self:
        """To the other ranks. Raises StartupError unless each has one address."""
        others = {rank: address for rank, address in addresses.items() if rank != self._rank}
        if others.keys() != self._keys.peers.keys():
            text = f"expected addresses of ranks {sorted(self._keys.peers)}, found those of {sorted(others)}"
            raise StartupError(f"rank {self._rank}: {text}", rank=self._rank)
        for rank, address in others.items():
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
            configure(socket, _LIMIT_BYTES)
            socket.setsockopt(zmq.IPV6, "[" in address)
            ClientKeys(self._keys.own, self._keys.peers[rank]).secure(socket)
            socket.connect(address)
            self._outgoing[rank] = socket
        return self

    def send(self, rank: int, parts: Sequence[bytes | memoryview]) -> None:
        """Copies the parts, and does not wait. Raises EngineUnhealthy for a rank that has refused this one."""
        self._sent[rank] += 1
        try:
            self._outgoing[rank].send_multipart([_NUMBER.pack(self._sent[rank]), *parts], zmq.DONTWAIT)
        except zmq.Again as error:
            text = f"rank {self._rank}: expected rank {rank} to take frames, found that it has closed the link"
            raise EngineUnhealthy(text, rank=rank, cause="closed") from error

    def has_frame(self, rank: int, wait_s: float) -> bool:
        """Whether `receive` would not wait, after waiting for up to `wait_s`. Raises ProtocolError."""
        deadline = time.monotonic() + wait_s
        while not self._waiting[rank] and self._socket.poll(remaining_ms(deadline)):
            self._take()
        return bool(self._waiting[rank])

    def receive(self, rank: int, patience_s: float) -> list[bytes]:
        """The parts of the next frame from `rank`. Raises EngineUnhealthy if it does not come, and ProtocolError."""
        deadline = time.monotonic() + patience_s
        while not self.has_frame(rank, min(_LOOK_S, patience_s)):
            if time.monotonic() > deadline:
                text = f"rank {self._rank}: expected rank {rank} to send within {patience_s:g} s, found it missing"
                raise EngineUnhealthy(text, rank=rank, cause="missing")
        return self._waiting[rank].popleft()

    def close(self) -> None:
        """Can be called twice."""
        for socket in (self._socket, *self._outgoing.values()):
            socket.close(linger=0)

    def _take(self) -> None:
        try:
            first, *parts = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            # what could be read was only ZeroMQ's own note of who has connected
            return
        # of the key that the connection was made with
        peer = self._rank_of[str(first["User-Id"])]
        expected = self._received[peer] + 1
        found = _NUMBER.unpack(first.bytes)[0] if len(first.bytes) == _NUMBER.size else None
        if found != expected:
            raise ProtocolError(f"rank {self._rank}: expected frame {expected} of rank {peer}, found {found}")
        self._received[peer] = expected
        self._waiting[peer].append([part.bytes for part in parts])
