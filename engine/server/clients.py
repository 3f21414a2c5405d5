"""Who calls: one client per API key, with its limits, its share and what it uses now.

A rate is a bucket that fills steadily and holds a minute's worth. Requests are paid on arrival. Tokens are paid when
they are known, prompts at the start and outputs as they come, so a bucket of tokens can fall below zero; its owner then
waits until it has filled again, and no rate is exceeded in the long run.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sempre.engine.server.api_keys import ApiKey
from sempre.engine.server.errors import BadRequest, RateLimited
from sempre.engine.server.ledger import Ledger
from sempre.ipc.messages import TenantSpec

_MINUTE_S = 60.0
# Fraction of the server's places that one of several keys leaves to the others.
_SHARE_FOR_OTHERS = 4
Clock = Callable[[], float]


class Rate:
    """What one key may use per minute of one kind."""

    def __init__(self, what: str, per_minute: int, ledger: Ledger, clock: Clock) -> None:
        self.what = what
        self.per_minute = per_minute
        self._ledger = ledger
        self._clock = clock
        # what has been used and not yet filled again, and when that was
        self._state = ledger.common(2)

    def level(self) -> float:
        """What may be used now."""
        used, since = self._state
        return self.per_minute - max(0.0, used - (self._clock() - since) * self.per_minute / _MINUTE_S)

    def take(self, amount: int) -> None:
        """Use something, known to be too much or not."""
        with self._ledger.alone():
            self._take(amount)

    def take_one(self) -> bool:
        """Use one, if there is one."""
        with self._ledger.alone():
            is_there = self.level() >= 1.0
            if is_there:
                self._take(1)
            return is_there

    def _take(self, amount: int) -> None:
        self._state[0], self._state[1] = self.per_minute - self.level() + amount, self._clock()

    def wait_s(self) -> float:
        """Seconds until one more may be used."""
        return max(0.0, (1.0 - self.level()) * _MINUTE_S / self.per_minute)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's headers: the limit, what is left of it, and when it will be whole again."""
        left = self.level()
        reset_s = (self.per_minute - left) * _MINUTE_S / self.per_minute
        values = (("limit", str(self.per_minute)), ("remaining", str(max(0, int(left)))), ("reset", f"{reset_s:.3f}s"))
        return [(f"x-ratelimit-{name}-{self.what}".encode(), value.encode()) for name, value in values]


class Client:
    """One key's use of the server; without keys, everybody is one client without limits."""

    def __init__(
        self, ledger: Ledger, key: ApiKey | None = None, salt: str | None = None, clock: Clock = time.monotonic
    ) -> None:
        """`salt` keeps its prompts apart from those of others in the prefix cache; None: it shares."""
        self.name = None if key is None else key.name
        self.tenant = None if key is None else TenantSpec(name=key.name, weight=key.weight)
        self._salt = salt
        self._max_sequences = 0 if key is None else key.max_sequences
        limits = (0, 0) if key is None else (key.requests_per_minute, key.tokens_per_minute)
        self._requests, self._tokens = (
            Rate(what, limit, ledger, clock) if limit else None
            for what, limit in zip(("requests", "tokens"), limits, strict=True)
        )
        self._rates = [rate for rate in (self._tokens, self._requests) if rate is not None]
        self.leaves_room = False
        """whether other keys exist, to which it leaves a part of the server's places"""
        self._ledger = ledger
        self._sequences = ledger.gauge(1)
        self._used = ledger.counter(2)

    @property
    def num_sequences(self) -> int:
        return int(self._sequences.total())

    @property
    def num_tokens(self) -> int:
        return int(self._used.total(0))

    @property
    def num_refused(self) -> int:
        return int(self._used.total(1))

    def enter(self) -> None:
        """Count a request on its arrival. Raises RateLimited (429)."""
        if self._tokens is not None and self._tokens.level() < 1.0:
            raise self._refused_by(self._tokens)
        if self._requests is not None and not self._requests.take_one():
            raise self._refused_by(self._requests)

    def _refused_by(self, rate: Rate) -> RateLimited:
        self._used.own[1] += 1
        return RateLimited(f"This API key may use {rate.per_minute} {rate.what} per minute.", math.ceil(rate.wait_s()))

    def admit(self, num_sequences: int, capacity: int, retry_after_s: int) -> None:
        """Count the sequences of a request. Raises RateLimited if the key has too many for now, BadRequest if it would
        alone. `capacity`: sequences that the server holds; a key that may have all of them is not asked here."""
        most = capacity - capacity // _SHARE_FOR_OTHERS if self.leaves_room else capacity
        most = min(most, self._max_sequences or most)
        if most == capacity:
            self._sequences.own[0] += num_sequences
            return
        if num_sequences > most:
            raise BadRequest(
                f"The request asks for {num_sequences} sequences (prompts times n), and this API key may have {most} "
                "at a time.",
                param="n",
            )
        with self._ledger.alone():
            has_room = self.num_sequences + num_sequences <= most
            if has_room:
                self._sequences.own[0] += num_sequences
        if not has_room:
            self._used.own[1] += 1
            raise RateLimited(f"This API key may have {most} sequences at a time.", retry_after_s)

    def release(self, num_sequences: int) -> None:
        """Sequences that `admit` has counted have ended."""
        self._sequences.own[0] -= num_sequences

    def charge(self, num_tokens: int) -> None:
        """Count tokens of prompts and outputs."""
        self._used.own[0] += num_tokens
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def salted(self, prompts: Sequence[Any]) -> list[Any]:
        """Return the prompts with this client's salt before their own."""
        if self._salt is None:
            return list(prompts)
        return [{**prompt, "cache_salt": self._salted(prompt)} for prompt in prompts]

    def _salted(self, prompt: Mapping[str, Any]) -> str:
        own = prompt.get("cache_salt")
        assert self._salt is not None
        return self._salt if own is None else f"{self._salt} {own}"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return response headers that tell the rates."""
        return [header for rate in self._rates for header in rate.headers()]


class KeyRing:
    """The clients by key. Only digests of keys are kept; all of them are compared, each in constant time."""

    def __init__(
        self,
        keys: Sequence[ApiKey],
        ledger: Ledger,
        *,
        shares_prefix_cache: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        """Of several keys none shares the prefix cache of another unless `shares_prefix_cache`."""
        several = len(keys) > 1
        salts = several and not shares_prefix_cache
        self._digests = [_digest(key.secret) for key in keys]
        # a salt shows in KV events, so it must not be made from the key
        self.clients = [Client(ledger, key, f"key {index}" if salts else None, clock) for index, key in enumerate(keys)]
        for client in self.clients:
            client.leaves_room = several
            if not several:
                client.tenant = None
        self.anybody = Client(ledger)
        """the client of a server without keys"""

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: str) -> Client | None:
        """Return the client with this key."""
        found = _digest(key)
        matches = [hmac.compare_digest(found, digest) for digest in self._digests]
        return next((client for client, is_it in zip(self.clients, matches, strict=True) if is_it), None)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
