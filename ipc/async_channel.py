"""The connecting end of a channel for asyncio, apart because most processes of an engine have no event loop."""

from __future__ import annotations

import time
from types import UnionType

import zmq
import zmq.asyncio

from sempre.ipc.channel import PeerBase, remaining_ms
from sempre.ipc.codec import MessageT


class AsyncPeerChannel(PeerBase[MessageT]):
    """Belongs to the event loop that runs when it is made."""

    def __init__(self, address: str, *, receives: UnionType, limit_bytes: int) -> None:
        self._async_socket = zmq.asyncio.Context(zmq.Context.instance()).socket(zmq.DEALER)
        super().__init__(address, receives=receives, limit_bytes=limit_bytes, socket=self._async_socket)

    async def receive(self, timeout_s: float) -> MessageT | None:
        """As PeerChannel.receive. Safe to cancel: with DONTWAIT a frame is taken only once it can be returned."""
        deadline = time.monotonic() + timeout_s
        while await self._async_socket.poll(remaining_ms(deadline)):
            message = self._take(await self._async_socket.recv_multipart(zmq.DONTWAIT))
            if message is not None:
                return message
        return None
