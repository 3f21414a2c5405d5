"""Publishes the events of the prefix caches over ZeroMQ, one publisher per replica.

    engine thread ── PUSH ─→ PULL ── publishing thread ── PUB ─→ subscribers       topic, sequence number, batch
                                                      └── ROUTER ⇄ replay           ask: "", first number
                                                                                    answers: "", number, batch; the last
                                                                                    has number -1 and no batch

Sequence numbers are 8 bytes, big-endian, and count from 0. No socket of the engine's thread ever waits: a subscriber
that does not read misses batches, sees it in the numbers, and can ask for them as long as they are kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import msgspec
import zmq

from sempre.engine.scheduling.kv_events import KVEventBatch, KVEvents
from sempre.ipc.config import KVEventsConfig
from sempre.ipc.errors import ConfigError

logger = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
"""Instead of a sequence number: nothing follows."""
_STOP = [b""]
_JOIN_S = 10.0

Frames = list[bytes]


class KVEventPublishers:
    """Those of all replicas; none if nothing is to be published."""

    def __init__(self, config: KVEventsConfig | None, num_replicas: int) -> None:
        self._config = config if config is not None and config.publishes else None
        self._num_replicas = num_replicas
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._publishers: list[KVEventPublisher] = []

    def open(self) -> None:
        """Bind or connect the sockets, unless that is done. Raises ConfigError for an address that is refused."""
        if self._config is None or self._context is not None:
            return
        # one of its own: whoever ends the process' shared context need not know of these sockets
        self._context = zmq.Context()
        for replica in range(self._num_replicas):
            self._publishers.append(KVEventPublisher(self._context, self._config, replica))

    def follow(self, replica: int, block_size: int) -> KVEvents | None:
        """The events of a replica, which are published from now on; None if they are not wanted."""
        if self._config is None:
            return None
        events = KVEvents(block_size)
        self._publishers[replica].follow(events)
        return events

    def flush(self) -> None:
        """Publish what has happened since the last call, a batch for each replica where something has."""
        for publisher in self._publishers:
            publisher.flush()

    def close(self) -> None:
        """End the threads and close the sockets; may be called twice."""
        publishers, self._publishers = self._publishers, []
        for publisher in publishers:
            publisher.close()
        if self._context is not None:
            self._context.destroy(linger=0)


class KVEventPublisher:
    """Publishes the events of one replica, from a thread of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], config: KVEventsConfig, replica: int) -> None:
        self._replica = replica
        self._events: KVEvents | None = None
        self._sequence = 0
        self._is_behind = False
        self._topic = config.topic.encode()
        self._kept: deque[Frames] = deque(maxlen=config.buffer_steps)
        self._pub = context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        address, *replay_address = config.addresses(replica)
        _open(self._pub, address, "endpoint", binds=address.startswith("ipc://") or "*" in address or "::" in address)
        self._replay: zmq.Socket[bytes] | None = None
        if replay_address:
            self._replay = context.socket(zmq.ROUTER)
            # all that is kept fits; a client that asks on without reading gets an error here, and no more memory
            self._replay.set_hwm(config.buffer_steps + 1)
            self._replay.setsockopt(zmq.ROUTER_MANDATORY, 1)
            _open(self._replay, replay_address[0], "replay_endpoint", binds=True)
        self._pull, self._push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        # the two limits are added, and 0 is none
        self._pull.set_hwm(min(1, config.max_queue_size))
        self._push.set_hwm(config.max_queue_size)
        self._pull.bind(f"inproc://kv-events-{replica}")
        self._push.connect(f"inproc://kv-events-{replica}")
        self._thread = threading.Thread(target=self._publish, name=f"kv-events-{replica}", daemon=True)
        self._thread.start()

    # In the engine's thread

    def follow(self, events: KVEvents) -> None:
        """Publish these events from now on."""
        self._events = events

    def flush(self) -> None:
        """Hand over what has happened since the last call; never waits."""
        events = [] if self._events is None else self._events.take()
        if not events:
            return
        batch = KVEventBatch(ts=time.time(), events=events, data_parallel_rank=self._replica)
        frames = [self._sequence.to_bytes(8, "big"), msgspec.msgpack.encode(batch)]
        self._sequence += 1
        try:
            self._push.send_multipart(frames, zmq.NOBLOCK)
            self._is_behind = False
        except zmq.Again:
            if not self._is_behind:
                logger.warning(
                    "kv_events_config['max_queue_size']: the publisher of replica %d is behind, and batches from number"
                    " %d on are lost, which subscribers see",
                    self._replica,
                    self._sequence - 1,
                )
            self._is_behind = True

    def close(self) -> None:
        """Publish what is queued, then end."""
        self._push.setsockopt(zmq.SNDTIMEO, int(1000 * _JOIN_S))
        self._push.send_multipart(_STOP)
        self._thread.join(_JOIN_S)
        self._push.close(linger=0)

    # In the publishing thread

    def _publish(self) -> None:
        poller = zmq.Poller()
        sockets = [self._pull, *([] if self._replay is None else [self._replay])]
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._pull in ready:
                frames = self._pull.recv_multipart()
                if frames == _STOP:
                    break
                self._pub.send_multipart([self._topic, *frames])
                self._kept.append(frames)
            if self._replay is not None and self._replay in ready:
                self._repeat(self._replay, self._replay.recv_multipart())
        for socket in (self._pub, *sockets):
            socket.close(linger=0)

    def _repeat(self, replay: zmq.Socket[bytes], request: Frames) -> None:
        """Answer a request for the kept batches from a number on."""
        match request:
            case [client, b"", first] if len(first) == 8:
                start = int.from_bytes(first, "big")
            case _:
                logger.warning("a replay request must be an empty frame and one of 8 bytes, found %d", len(request) - 1)
                return
        wanted = [frames for frames in self._kept if int.from_bytes(frames[0], "big") >= start]
        try:
            for frames in [*wanted, [END, b""]]:
                replay.send_multipart([client, b"", *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("a replay from number %d was given up: %s", start, error)


def _open(socket: zmq.Socket[bytes], address: str, name: str, *, binds: bool) -> None:
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        if binds:
            socket.bind(address)
        else:
            socket.connect(address)
    except zmq.ZMQError as error:
        verb = "bind" if binds else "connect to"
        raise ConfigError(
            f"kv_events_config[{name!r}]: cannot {verb} {address}: {error.strerror}. Choose another address.",
            parameter="kv_events_config",
            value=address,
        ) from error
