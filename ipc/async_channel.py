"""The connecting end of a channel for asyncio; separate because most engine processes have no event loop."""

from __future__ import annotations

import time
from types import UnionType

import zmq
import zmq.asyncio

from sempre.ipc.channel import PeerBase, remaining_ms
from sempre.ipc.codec import MessageT


class AsyncPeerChannel(PeerBase[MessageT]):
    """Bound to the event loop that is running when it is created."""

    def __init__(self, address: str, *, receives: UnionType, limit_bytes: int) -> None:
        self._async_socket = zmq.asyncio.Context(zmq.Context.instance()).socket(zmq.DEALER)
        self._blocking_socket: zmq.Socket[bytes] = zmq.Socket.shadow(self._async_socket)
        super().__init__(address, receives=receives, limit_bytes=limit_bytes, socket=self._async_socket)

    async def receive(self, timeout_s: float) -> MessageT | None:
        """Like PeerChannel.receive; a message that has already arrived is returned without yielding to other tasks.

        Safe to cancel: a frame is taken only once it can be returned.
        """
        deadline = time.monotonic() + timeout_s
        while (message := self._arrived()) is None:
            if not await self._async_socket.poll(remaining_ms(deadline)):
                return None
        return message

    def _arrived(self) -> MessageT | None:
        """The next message, if there is one already."""
        while True:
            try:
                parts = self._blocking_socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            message = self._take(parts)
            if message is not None:
                return message
