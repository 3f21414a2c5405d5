"""Typed ZeroMQ channels: a hub that binds, and peers that connect to it.

A frame that cannot be accepted is answered with `Refused` and logged, here and only here. From a peer that has not been
accepted it is otherwise ignored; on an established link the owner is told, because its content is lost. Errors carry
the address. Channels belong to one thread at a time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType, UnionType
from typing import Any, Generic, Self

import zmq
from msgspec.structs import replace

from sempre.ipc.codec import UNSEQUENCED, FrameDecoder, FrameEncoder, MessageT
from sempre.ipc.curve import ClientKeys
from sempre.ipc.error_info import describe
from sempre.ipc.errors import FrameLost, MessageMalformed, ProtocolError, VersionMismatch
from sempre.ipc.messages import PROTOCOL_VERSION, ClientHello, Message, NodeHello, Refused, WorkerHello

logger = logging.getLogger(__name__)
# otherwise two peers could refuse each other's refusals forever
_MOST_REFUSALS = 16
_RECONNECT_MS = 10
_TELL_BYTES = 1 << 20
# characters of each text in a refusal
_SHOWN = 2000

SecureSocket = Callable[[zmq.Socket[Any]], None]


class Link(Generic[MessageT]):
    """Counts the frames of one link, so that a lost frame is an error and a repeated one is dropped.

    Of a peer that says what it has read, it also counts the bytes of what it has not.
    """

    def __init__(
        self,
        encoder: FrameEncoder,
        decoder: FrameDecoder[MessageT],
        *,
        received: int = 0,
        counts_unread: bool = False,
    ) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._sent = 0
        self.received = received
        self.unread_bytes = 0
        self._unread: deque[int] | None = deque() if counts_unread else None

    def pack(self, message: Message) -> bytearray:
        frame = self._encoder.encode(message, self._sent + 1)
        self._sent += 1
        if self._unread is not None:
            self._unread.append(len(frame))
            self.unread_bytes += len(frame)
        return frame

    def has_read(self, sequence: int) -> None:
        """The peer has read the frames up to this number."""
        if self._unread is not None:
            for _ in range(min(len(self._unread), sequence - (self._sent - len(self._unread)))):
                self.unread_bytes -= self._unread.popleft()

    def unpack(self, parts: Sequence[bytes]) -> MessageT | None:
        """The message in these parts; None for a duplicate. Raises ProtocolError; counting continues afterwards."""
        try:
            sequence, message = self._decoder.decode(single_part(parts))
        except ProtocolError:
            # whatever it was, it counts as one frame
            self.received += 1
            raise
        if sequence == UNSEQUENCED:
            return message
        expected = self.received + 1
        if sequence < expected:
            return None
        self.received = sequence
        if sequence > expected:
            raise FrameLost(
                f"sequence: expected frame {expected} of this link, found {sequence}; what lies between was lost",
                expected=expected,
                found=sequence,
            )
        return message


def single_part(parts: Sequence[bytes]) -> bytes:
    """The only part of a received message; raises MessageMalformed when there are more."""
    if len(parts) != 1:
        raise MessageMalformed(f"parts: expected 1 part, found {len(parts)}", field="parts")
    return parts[0]


def configure(socket: zmq.Socket[Any], limit_bytes: int) -> None:
    """No linger, no silent drops at a high-water mark, and the transport's own size limit behind the codec's."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, 2 * limit_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)


def listen(socket: zmq.Socket[Any], address: str) -> str:
    """Bind to a TCP address, and return it with its port. Raises ZMQError."""
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.bind(address)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


class PeerBase(Generic[MessageT]):
    """The connecting end, whatever kind of socket it uses."""

    def __init__(
        self,
        address: str,
        *,
        receives: UnionType,
        limit_bytes: int,
        socket: zmq.Socket[Any],
        keys: ClientKeys | None = None,
    ) -> None:
        self.address = address
        self.socket = socket
        configure(socket, limit_bytes)
        if keys is not None:
            keys.secure(socket)
            socket.setsockopt(zmq.IPV6, "[" in address)
        self.refusals = Refusals(address)
        self._link: Link[MessageT] = Link(FrameEncoder(limit_bytes), FrameDecoder(receives, limit_bytes))
        self._read_bytes = 0
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close()
            raise ProtocolError(f"cannot connect to {address}: {error}") from error

    def send(self, message: Message) -> None:
        """Never blocks. Raises MessageTooLarge; TypeError when a free-form value has no msgpack form."""
        self.socket.send(self._link.pack(message), zmq.DONTWAIT)

    def read_up_to(self) -> int | None:
        """The number of the last frame, for the hub to know, once every `_TELL_BYTES` that were read; else None."""
        if self._read_bytes < _TELL_BYTES:
            return None
        self._read_bytes = 0
        return self._link.received

    def _take(self, parts: Sequence[bytes]) -> MessageT | None:
        """The message in these parts; None for a duplicate. Raises ProtocolError after answering."""
        self._read_bytes += sum(map(len, parts))
        try:
            return self._link.unpack(parts)
        except ProtocolError as error:
            if self.refusals.note(error, "the hub"):
                self.send(_refused(error))
            raise

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class PeerChannel(PeerBase[MessageT]):
    """The connecting end; `receives` is the union of the messages that may arrive, `keys` those of a link between
    hosts."""

    def __init__(self, address: str, *, receives: UnionType, limit_bytes: int, keys: ClientKeys | None = None) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        super().__init__(address, receives=receives, limit_bytes=limit_bytes, socket=socket, keys=keys)

    def receive(self, timeout_s: float | None = None) -> MessageT | None:
        """The next message; None when there is none within `timeout_s`. Raises ProtocolError for a refused frame."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.socket.poll(remaining_ms(deadline)):
            message = self._take(self.socket.recv_multipart(zmq.DONTWAIT))
            if message is not None:
                return message
        return None


class HubChannel(Generic[MessageT]):
    """The binding end, with many peers; a peer is known by the routing id that ZeroMQ gave its connection."""

    def __init__(
        self, address: str, *, receives: UnionType, limit_bytes: int, secure: SecureSocket | None = None
    ) -> None:
        """`secure` prepares the socket of a link between hosts."""
        self.address = address
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        configure(self.socket, limit_bytes)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.refusals = Refusals(address)
        self._encoder = FrameEncoder(limit_bytes)
        self._decoder: FrameDecoder[MessageT] = FrameDecoder(receives, limit_bytes)
        self._links: dict[bytes, Link[MessageT]] = {}
        try:
            if secure is None:
                self.socket.bind(address)
            else:
                self.address = self.bind_also(address, secure)
        except ProtocolError:
            self.socket.close()
            raise
        except zmq.ZMQError as error:
            self.socket.close()
            raise ProtocolError(f"cannot bind {address}: {error}") from error

    def bind_also(self, address: str, secure: SecureSocket) -> str:
        """Listen on another address, for peers on other hosts; return it with its port. Addresses of before stay as
        they are. Raises ProtocolError."""
        secure(self.socket)
        try:
            return listen(self.socket, address)
        except zmq.ZMQError as error:
            raise ProtocolError(f"cannot bind {address}: {error}") from error

    def accept(self, identity: bytes, *, counts_unread: bool = False) -> None:
        """Establish the link with a peer whose hello, its first frame, was valid; `counts_unread`: it tells what it has
        read."""
        self._links[identity] = Link(self._encoder, self._decoder, received=1, counts_unread=counts_unread)

    def has_read(self, identity: bytes, sequence: int) -> None:
        """The peer has read the frames up to this number."""
        self._links[identity].has_read(sequence)

    def unread_bytes(self, identity: bytes) -> int:
        """Bytes of frames that the peer has not read, as far as it has told; it tells every `_TELL_BYTES`."""
        return self._links[identity].unread_bytes

    def forget(self, identity: bytes) -> None:
        """End the link with a peer that has ended; its earlier frames are no longer decoded in order."""
        self._links.pop(identity, None)

    def send(self, identity: bytes, message: Message) -> None:
        """Never blocks. Raises ProtocolError when the peer is gone, MessageTooLarge, TypeError (no msgpack form)."""
        self._send_frame(identity, self._links[identity].pack(message))

    def receive(self, timeout_s: float = 0.0) -> tuple[bytes, MessageT | ProtocolError] | None:
        """The next message and its sender, or the error of a frame refused on an established link; else None."""
        deadline = time.monotonic() + timeout_s
        while self.socket.poll(remaining_ms(deadline)):
            identity, *parts = self.socket.recv_multipart(zmq.DONTWAIT)
            link = self._links.get(identity)
            try:
                message = link.unpack(parts) if link else self._decoder.decode(single_part(parts))[1]
            except ProtocolError as error:
                self.refuse(identity, error)
                if link:
                    return identity, error
                message = None
            if message is not None:
                return identity, message
            if time.monotonic() >= deadline:
                # a flood of refused frames must not hold the caller
                return None
        return None

    def refuse(self, identity: bytes, error: ProtocolError) -> None:
        """Answer a frame with `Refused`; a peer that is gone by now needs no answer."""
        if not self.refusals.note(error, f"peer {identity.hex()}") and identity in self._links:
            return
        message = _refused(error)
        link = self._links.get(identity)
        frame = link.pack(message) if link else self._encoder.encode(message, UNSEQUENCED)
        try:
            self._send_frame(identity, frame)
        except ProtocolError as gone:
            logger.debug("%s", gone)

    def close(self) -> None:
        self.socket.close()

    def _send_frame(self, identity: bytes, frame: bytearray) -> None:
        try:
            self.socket.send_multipart([identity, frame], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            raise ProtocolError(f"{self.address}: cannot reach peer {identity.hex()}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _refused(error: ProtocolError) -> Refused:
    """The answer to a frame, short enough for every limit, whatever the frame held."""
    info = describe(error)
    facts = {name: fact[:_SHOWN] if isinstance(fact, str) else fact for name, fact in info.facts.items()}
    return Refused(error=replace(info, message=info.message[:_SHOWN], traceback=info.traceback[-_SHOWN:], facts=facts))


class Refusals:
    """The refusals of one socket: each is logged once, and after `_MOST_REFUSALS` a peer is left without an answer."""

    def __init__(self, address: str) -> None:
        self.count = 0
        self._address = address

    def note(self, error: ProtocolError, sender: str) -> bool:
        """Log it; True while it may be answered."""
        self.count += 1
        logger.warning("%s: refused a frame from %s: %s", self._address, sender, error)
        return self.count <= _MOST_REFUSALS


def remaining_ms(deadline: float | None) -> int | None:
    """The timeout for ZeroMQ's polls; None waits forever."""
    if deadline is None:
        return None
    return max(0, round((deadline - time.monotonic()) * 1000))


def check_version(hello: ClientHello | WorkerHello | NodeHello) -> None:
    """Raises VersionMismatch."""
    if hello.protocol_version != PROTOCOL_VERSION:
        name = type(hello).__name__
        raise VersionMismatch(
            f"{name}.protocol_version: expected {PROTOCOL_VERSION}, found {hello.protocol_version}; "
            "both processes must run the same installation",
            expected=PROTOCOL_VERSION,
            found=hello.protocol_version,
        )


def check_pid(hello: ClientHello | WorkerHello, expected: int) -> None:
    """Raises MessageMalformed when a process other than the expected one says hello."""
    if hello.pid != expected:
        field = f"{type(hello).__name__}.pid"
        raise MessageMalformed(f"{field}: expected {expected}, found {hello.pid}", field=field)
