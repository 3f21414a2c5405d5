"""A proxy between the two ends of a link that damages chosen frames.

It takes the hub's address, opens its own connection to the hub for each peer, and forwards every frame, reading only
its tag.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import msgspec
import zmq

from sempre.ipc.codec import HEADER_BYTES

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Fault:
    """Damage to the `nth` frame (from 1, counted from the injection) in `direction`: "up" from the worker or client to
    the coordinator, "down" from it. `message` names the message type to count; None: any.

    delay: it and all frames after it wait `delay_s`. drop: it never arrives. duplicate: it arrives twice.
    corrupt: its last byte is inverted. reorder: it arrives after the next one. partition: for `delay_s` nothing arrives
    in either direction, of any peer; then everything does, as over a connection that was not closed.
    """

    action: Literal["delay", "drop", "duplicate", "corrupt", "reorder", "partition"]
    direction: Direction
    message: str | None = None
    nth: int = 1
    delay_s: float = 0.5


@dataclass
class _Armed:
    fault: Fault
    seen: int = 0

    def strikes(self, direction: Direction, tag: str) -> bool:
        if direction != self.fault.direction or self.fault.message not in (None, tag):
            return False
        self.seen += 1
        return self.seen == self.fault.nth


@dataclass
class _Lane:
    """One direction of one peer's connection: frames and the times at which they may leave."""

    direction: Direction
    socket: zmq.Socket[bytes]
    address: list[bytes]
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    held: bytes | None = None
    """a frame that arrives after the next one"""
    closed_until: float = 0.0

    def put(self, frame: bytes, delay_s: float) -> None:
        ready = max(time.monotonic() + delay_s, self.closed_until)
        if self.waiting:
            ready = max(ready, self.waiting[-1][0])
        self.waiting.append((ready, frame))
        if self.held is not None:
            self.waiting.append((ready, self.held))
            self.held = None

    def close(self, seconds: float) -> None:
        """Let nothing through for so long."""
        self.closed_until = time.monotonic() + seconds
        self.waiting = deque((max(ready, self.closed_until), frame) for ready, frame in self.waiting)

    def flush(self) -> None:
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            self.socket.send_multipart([*self.address, self.waiting.popleft()[1]])


class FaultProxy:
    """Runs in its own thread from construction to `close`."""

    def __init__(self, address: str, hub_address: str, faults: Sequence[Fault] = ()) -> None:
        self.address = address
        self._hub_address = hub_address
        self._armed = [_Armed(fault) for fault in faults]
        self._lock = threading.Lock()
        self._struck: list[Fault] = []
        self._closing = threading.Event()
        self._front = _socket(zmq.ROUTER)
        self._front.bind(address)
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._lanes: dict[tuple[bytes, Direction], _Lane] = {}
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()

    def inject(self, fault: Fault) -> None:
        """Add a fault; frames are counted from now on."""
        with self._lock:
            self._armed.append(_Armed(fault))

    def struck(self) -> list[Fault]:
        """The faults that have happened, in order."""
        with self._lock:
            return self._struck.copy()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._closing.is_set():
            readable = dict(poller.poll(10))
            if self._front in readable:
                identity, *frames = self._front.recv_multipart()
                if identity not in self._backs:
                    poller.register(self._connect(identity), zmq.POLLIN)
                self._carry(identity, "up", frames)
            for identity, back in self._backs.items():
                if back in readable:
                    self._carry(identity, "down", back.recv_multipart())
            for lane in self._lanes.values():
                lane.flush()
        for socket in (self._front, *self._backs.values()):
            socket.close()

    def _connect(self, identity: bytes) -> zmq.Socket[bytes]:
        back = _socket(zmq.DEALER)
        back.connect(self._hub_address)
        self._backs[identity] = back
        self._lanes[identity, "up"] = _Lane("up", back, [])
        self._lanes[identity, "down"] = _Lane("down", self._front, [identity])
        return back

    def _carry(self, identity: bytes, direction: Direction, frames: Sequence[bytes]) -> None:
        lane = self._lanes[identity, direction]
        for frame in frames:
            fault = self._strike(direction, _tag(frame))
            match fault.action if fault else None:
                case "drop":
                    continue
                case "corrupt":
                    frame = frame[:-1] + bytes([frame[-1] ^ 0xFF])
                case "duplicate":
                    lane.put(frame, 0.0)
                case "reorder" if lane.held is None:
                    lane.held = frame
                    continue
                case "partition" if fault is not None:
                    for each in self._lanes.values():
                        each.close(fault.delay_s)
            lane.put(frame, fault.delay_s if fault and fault.action == "delay" else 0.0)

    def _strike(self, direction: Direction, tag: str) -> Fault | None:
        """The fault for this frame; every pending fault counts the frame."""
        with self._lock:
            hits = [armed.fault for armed in self._armed if armed.strikes(direction, tag)]
            self._struck += hits[:1]
        return hits[0] if hits else None


def _socket(kind: int) -> zmq.Socket[bytes]:
    """Like a channel's, but without its size limit: the ends refuse frames that are too large."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.RECONNECT_IVL, 10)):
        socket.setsockopt(option, value)
    return socket


def _tag(frame: bytes) -> str:
    """The message's tag, or empty."""
    try:
        head = msgspec.msgpack.decode(memoryview(frame)[HEADER_BYTES:], type=list[msgspec.Raw])
        return msgspec.msgpack.decode(head[0], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
        return ""
