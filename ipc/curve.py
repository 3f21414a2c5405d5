"""Keys of links between hosts: ZeroMQ's CURVE, which encrypts and authenticates both ends.

The nodes of an engine have one secret in common, in a file that only their user can read; the keys of the link between
two nodes follow from it. Workers get keys of their own for each start, over that link.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

import zmq
from msgspec import Struct

from sempre.ipc.errors import ConfigError
from sempre.ipc.key_pairs import KeyPair

HEAD = "head"
_SECRET_BYTES = 32
_SECRET = re.compile(rb"[0-9a-f]{64}\n?")
_MODE = 0o600


def node_owner(number: int) -> str:
    """Host `number`, 1 or more, as an owner of keys."""
    return f"node {number}"


class ClientKeys(Struct, frozen=True, array_like=True):
    """What the connecting end of a link has."""

    own: KeyPair
    server: str
    """the public key that the other end must have"""

    def secure(self, socket: zmq.Socket[Any]) -> None:
        """For what `socket` connects to from now on."""
        socket.curve_publickey = self.own.public.encode()
        socket.curve_secretkey = self.own.secret.encode()
        socket.curve_serverkey = self.server.encode()


class Gate:
    """Lets only peers with known keys connect to sockets of this process; a process has at most one."""

    def __init__(self) -> None:
        # imports asyncio, which a worker on the coordinator's host does not need
        from zmq.auth.thread import ThreadAuthenticator

        self._authenticator = ThreadAuthenticator(zmq.Context.instance())
        self._authenticator.start()
        self._domains: dict[str, _Domain] = {}
        self._is_closed = False

    def allow(self, domain: str, public: str) -> None:
        """From now on a peer with this key may connect to the sockets of `domain`."""
        self._domain(domain).keys.add(public.encode())

    def forbid(self, domain: str, public: str) -> None:
        """No more: its process is gone."""
        self._domain(domain).keys.discard(public.encode())

    def secure(self, socket: zmq.Socket[Any], domain: str, own: KeyPair) -> None:
        """For the addresses that `socket` is bound to from now on. A domain that allows nobody is closed."""
        self._domain(domain)
        socket.curve_server = True
        socket.curve_publickey = own.public.encode()
        socket.curve_secretkey = own.secret.encode()
        socket.zap_domain = domain.encode()

    def close(self) -> None:
        """Before the context ends; can be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._authenticator.stop()

    def _domain(self, name: str) -> _Domain:
        if name not in self._domains:
            self._domains[name] = domain = _Domain()
            self._authenticator.configure_curve_callback(name, credentials_provider=domain)
        return self._domains[name]


class _Domain:
    """`callback` is called by the authenticator's thread."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.keys


def make_key_file(path: Path) -> bool:
    """Write a new secret to `path`, for its owner alone, unless there is a file; whether it was written.

    Nobody can read a part of it. Raises ConfigError.
    """
    if path.exists():
        return False
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES).hex().encode() + b"\n")
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise _refused(path, f"cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    return True


def read_key_file(path: Path) -> bytes:
    """The secret in `path`. Raises ConfigError if others than its owner can read it; FileNotFoundError."""
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            text = file.read(1 + 2 * _SECRET_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from error
    if stat.S_IMODE(facts.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(facts.st_mode):04o}"
        raise _refused(path, f"expected a file that only its owner can read, found mode {mode}; run chmod 600 on it")
    if not _SECRET.fullmatch(text):
        raise _refused(path, f"expected {2 * _SECRET_BYTES} hexadecimal digits, as `openssl rand -hex 32` prints them")
    return bytes.fromhex(text.decode())


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(f"node_key_file: {path}: {why}.", parameter="node_key_file", value=str(path))
