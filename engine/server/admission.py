"""The bounded queue: how many sequences the server holds at a time, and when to retry."""

from __future__ import annotations

import math
import time
from collections import deque

from sempre.engine.server.errors import BadRequest, Busy
from sempre.engine.server.ledger import Ledger

_MAX_RETRY_S = 60
_RATE_SAMPLES = 64
# Fraction of the capacity that requests of many sequences leave to small ones.
_SHARE_FOR_SMALL = 4
_SMALL = 16


class Admission:
    """Counts sequences from their admission to their end; those beyond `capacity` are rejected.

    Requests of many sequences cannot fill it: the last part is reserved for small requests. `max_running` is the
    engine's, known once the engine is ready.
    """

    def __init__(self, ledger: Ledger, *, max_queued: int, max_running: int = 0) -> None:
        self._max_queued = max_queued
        self.max_running = max_running
        self._ledger = ledger
        self._sequences = ledger.gauge(1)
        self._rejected = ledger.counter(1)
        self.draining = False
        self._ends: deque[float] = deque(maxlen=_RATE_SAMPLES)

    @property
    def num_sequences(self) -> int:
        """Sequences that all API processes hold."""
        return int(self._sequences.total())

    @property
    def num_rejected(self) -> int:
        """Requests that all API processes have refused with 503."""
        return int(self._rejected.total())

    @property
    def capacity(self) -> int:
        return self.max_running + self._max_queued

    def admit(self, num_sequences: int) -> None:
        """Admit `num_sequences`. Raises Busy (503) if there is no room now, BadRequest if there never can be."""
        room = self._room(num_sequences)
        if num_sequences > room:
            raise BadRequest(
                f"The request asks for {num_sequences} sequences (prompts times n), and this server holds at most "
                f"{room} of one request (--max-num-seqs and --max-num-queued-reqs).",
                param="n",
            )
        if self.draining:
            self._rejected.own[0] += 1
            raise Busy("The server is shutting down and accepts no new requests.", 1)
        with self._ledger.alone():
            has_room = self.num_sequences + num_sequences <= room
            if has_room:
                self._sequences.own[0] += num_sequences
        if not has_room:
            self._rejected.own[0] += 1
            raise Busy(
                "The engine is currently busy and cannot accept new requests. Please try again later or on a "
                "different instance.",
                self.retry_after_s(num_sequences),
            )

    def _room(self, num_sequences: int) -> int:
        """Maximum sequences in the server including a new request of `num_sequences`."""
        return self.capacity if num_sequences <= _SMALL else self.capacity - self.capacity // _SHARE_FOR_SMALL

    def release(self, num_sequences: int) -> None:
        """Release admitted sequences."""
        self._sequences.own[0] -= num_sequences
        now = time.monotonic()
        self._ends.extend(now for _ in range(min(num_sequences, _RATE_SAMPLES)))

    def retry_after_s(self, num_sequences: int) -> int:
        """Estimated seconds until `num_sequences` will have ended, from those that ended last."""
        if len(self._ends) < 2:
            return 1
        seconds_each = (time.monotonic() - self._ends[0]) / len(self._ends)
        return max(1, min(_MAX_RETRY_S, math.ceil(seconds_each * num_sequences)))
