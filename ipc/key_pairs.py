"""Keys of links between hosts, as messages hold them (`ipc.curve`)."""

from __future__ import annotations

import hashlib
import hmac

from msgspec import Struct


class KeyPair(Struct, frozen=True, array_like=True):
    """A public key and its secret one, in Z85. Only who makes one needs ZeroMQ: messages hold them."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> KeyPair:
        import zmq

        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def derived(cls, secret: bytes, owner: str) -> KeyPair:
        """That of `owner`, the same wherever the secret is known."""
        import zmq
        from zmq.utils import z85

        own = z85.encode(hmac.digest(secret, owner.encode(), hashlib.sha256))
        return cls(zmq.curve_public(own).decode(), own.decode())


class WorkerKeys(Struct, frozen=True, array_like=True):
    """What a worker on one of several hosts is given at its start."""

    own: KeyPair
    hub: str = ""
    """public key of the coordinator's hub; empty: it is reached on this host"""
    peers: dict[int, str] = {}
    """public keys of the replica's other ranks; empty: they are on this host"""
