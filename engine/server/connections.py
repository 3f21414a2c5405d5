"""Limits on all connections of a server: their number, waiting times, and bytes of bodies held.

A connection *waits* until a whole request has arrived: it is idle, or sends a header or a body. Waiting connections
have a deadline. If there are too many connections, the one that has waited longest is closed, preferably one that has
never sent a whole request. So clients that open connections and send partial requests cannot keep others out. A
request that is being answered is never ended to make room for another.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
from collections import Counter, defaultdict
from itertools import chain
from typing import Protocol

from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError, Busy

logger = logging.getLogger(__name__)

SWEEP_S = 0.25
_REPORT_SWEEPS = 40
# files that the process needs in addition to its connections
_OTHER_FILES = 256
# of each body, so that ordinary requests never have to be evicted
UNCOUNTED_BYTES = 64 * 1024


class Connection(Protocol):
    """The interface of a connection."""

    address: str | None
    """the peer's address; None for a peer without one"""
    held_bytes: int
    """bytes of the body beyond UNCOUNTED_BYTES"""
    has_been_served: bool
    """it has received at least one whole request"""
    is_receiving: bool
    """the body is incomplete"""

    def expire(self, now: float) -> None:
        """End the connection if a deadline has passed."""
        ...

    def refuse(self, error: APIError) -> None:
        """Respond with `error`, and close once the client has had time to read it."""
        ...

    def make_room(self, error: APIError) -> None:
        """Like `refuse`, but at once; without a response if no request has begun."""
        ...


class ConnectionGuard:
    """Tied to the event loop of the first connection."""

    def __init__(self, config: ServerConfig) -> None:
        self.header_timeout = config.header_timeout
        self.body_timeout = config.body_timeout
        self.idle_timeout = config.keep_alive_timeout
        self._most = min(config.max_connections, _room_for_files())
        self._most_per_address = config.max_connections_per_address
        self._most_held = config.max_held_bytes
        self._all: dict[Connection, None] = {}
        # connections that have been served before come second
        self._waiting: tuple[dict[Connection, None], dict[Connection, None]] = ({}, {})
        self._by_address: defaultdict[str | None, dict[Connection, None]] = defaultdict(dict)
        self._holders: dict[Connection, None] = {}
        self._held_bytes = 0
        self._refused: Counter[int] = Counter()
        self._sweeps = 0

    def admit(self, connection: Connection) -> APIError | None:
        """Count a new, waiting connection; return the error to refuse it with if none can be closed for it."""
        peers = self._by_address[connection.address]
        if connection.address is not None and len(peers) >= self._most_per_address:
            text = f"from one address (--max-connections-per-address {self._most_per_address})"
            if not self._make_room(peers, text):
                return Busy(f"There are too many connections {text}.", 1)
        if len(self._all) >= self._most:
            text = f"(--max-connections {self._most})"
            if not self._make_room(self._all, text):
                return Busy(f"There are too many connections {text}.", 1)
        if not self._all:
            asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        self._all[connection] = peers[connection] = None
        self.wait(connection)
        return None

    def wait(self, connection: Connection) -> None:
        """The connection starts waiting for a request."""
        self._waiting[connection.has_been_served][connection] = None

    def serve(self, connection: Connection) -> None:
        """A whole request has arrived."""
        for waiting in self._waiting:
            waiting.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """The connection has ended."""
        self.release(connection)
        self.serve(connection)
        self._all.pop(connection, None)
        peers = self._by_address.get(connection.address, {})
        peers.pop(connection, None)
        if not peers:
            self._by_address.pop(connection.address, None)

    def hold(self, connection: Connection, num_bytes: int) -> None:
        """Count bytes of a body; beyond the limit the largest incomplete body is refused."""
        connection.held_bytes += num_bytes
        self._held_bytes += num_bytes
        self._holders[connection] = None
        while self._held_bytes > self._most_held:
            candidates = [holder for holder in self._holders if holder.is_receiving]
            largest = max(candidates, key=lambda holder: holder.held_bytes, default=None)
            if largest is None:
                return
            text = f"The server already holds {self._most_held} bytes of requests, its limit (--max-held-bytes)."
            largest.refuse(Busy(text, 2))
            self.release(largest)

    def release(self, connection: Connection) -> None:
        """The body is no longer held."""
        if self._holders.pop(connection, self) is None:
            self._held_bytes -= connection.held_bytes
            connection.held_bytes = 0

    def note(self, error: APIError) -> None:
        """Count a refusal for the log: one line for many, since clients can cause any number."""
        self._refused[error.status] += 1

    def _make_room(self, among: dict[Connection, None], text: str) -> bool:
        """Close the connection in `among` that has waited longest."""
        longest = next((waiting for waiting in chain(*self._waiting) if waiting in among), None)
        if longest is None:
            return False
        longest.make_room(Busy(f"There are too many connections {text}, and this one had waited longest.", 1))
        self.forget(longest)
        return True

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._all):
            connection.expire(now)
        self._sweeps += 1
        if self._refused and self._sweeps % _REPORT_SWEEPS == 0:
            counts = ", ".join(f"{count} with {status}" for status, count in sorted(self._refused.items()))
            logger.warning("connections refused in the last %g s: %s", _REPORT_SWEEPS * SWEEP_S, counts)
            self._refused.clear()
        if self._all or self._refused:
            loop.call_later(SWEEP_S, self._sweep)


def peer_address(host: str | None) -> str | None:
    """Return the key of a client: an IPv4 address, or a /64 network of IPv6."""
    if host is None:
        return None
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if found.version == 4:
        return host
    mapped = found.ipv4_mapped
    return str(mapped) if mapped is not None else found.packed[:8].hex()


def _room_for_files() -> int:
    """Raise the limit of open files as far as allowed; return the number of connections that fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:
            logger.debug("the limit of open files stays %d: %s", soft, error)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(16, soft - _OTHER_FILES)
