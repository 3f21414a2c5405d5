"""The connecting end of a channel for asyncio; separate because most engine processes have no event loop."""

from __future__ import annotations

import asyncio
from types import UnionType

import zmq

from sempre.ipc.channel import PeerBase
from sempre.ipc.codec import MessageT
from sempre.ipc.messages import Message


class AsyncPeerChannel(PeerBase[MessageT]):
    """Bound to the event loop that is running when it is created; one task may receive.

    The loop watches ZeroMQ's descriptor. That becomes readable when something happens, not while something is there,
    and every call to ZeroMQ may use that up; so whoever calls it asks afterwards whether a message has arrived.
    """

    def __init__(self, address: str, *, receives: UnionType, limit_bytes: int) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        super().__init__(address, receives=receives, limit_bytes=limit_bytes, socket=socket)
        self._loop = asyncio.get_running_loop()
        self._arrival: asyncio.Future[bool] | None = None
        self._descriptor = int(socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._look)

    async def receive(self, timeout_s: float) -> MessageT | None:
        """Like PeerChannel.receive; a message that has already arrived is returned without yielding to other tasks.

        Safe to cancel: a frame is taken only once it can be returned.
        """
        deadline = self._loop.time() + timeout_s
        while (message := self._arrived()) is None:
            if not await self._wait(deadline):
                return None
        return message

    def send(self, message: Message) -> None:
        super().send(message)
        self._look()

    def close(self) -> None:
        if not self.socket.closed and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        super().close()

    async def _wait(self, deadline: float) -> bool:
        """Wait for something to arrive; False if nothing has until the deadline (of the loop's clock)."""
        arrival = self._arrival = self._loop.create_future()
        timer = self._loop.call_at(deadline, _settle, arrival, False)
        try:
            has_arrived: bool = await arrival
            return has_arrived
        finally:
            timer.cancel()
            self._arrival = None

    def _look(self) -> None:
        if int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN and self._arrival is not None:
            _settle(self._arrival, True)

    def _arrived(self) -> MessageT | None:
        """The next message, if there is one already."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            message = self._take(parts)
            if message is not None:
                return message


def _settle(arrival: asyncio.Future[bool], has_arrived: bool) -> None:
    if not arrival.done():
        arrival.set_result(has_arrived)
