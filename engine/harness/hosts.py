"""Several hosts on one machine: network namespaces with addresses of their own, joined by a bridge.

    with make_hosts(2) as hosts:
        server = subprocess.Popen(hosts.command(1, ["python", "server.py", hosts.addresses[1]]))
        subprocess.run(hosts.command(0, ["python", "client.py", hosts.addresses[1]]))
        hosts.cut_off(1)

The machine's own network is not touched: the bridge is in a namespace, too. Namespaces need root and Linux; without
root the hosts are addresses of the loopback, which cannot be cut off, and a warning says so.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

logger = logging.getLogger(__name__)

_SUBNET = "10.83.0"
_MOST_HOSTS = 200


class Hosts(Protocol):
    """Hosts by number; processes are started on one by its command."""

    addresses: list[str]

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on a host."""

    def cut_off(self, host: int) -> None:
        """Let nothing through to and from a host until `reconnect`."""

    def reconnect(self, host: int) -> None:
        """Join a host to the others again."""

    def close(self) -> None:
        """End the hosts; processes on them must have ended. Can be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def make_hosts(count: int) -> Hosts:
    """Namespaces, or without root loopback addresses. Raises OSError where root cannot make namespaces."""
    if not 1 <= count <= _MOST_HOSTS:
        raise ValueError(f"count: expected 1 to {_MOST_HOSTS} hosts, found {count}")
    if os.geteuid() == 0:
        return NamespaceHosts(count)
    logger.warning("hosts are addresses of the loopback, which cannot be cut off: network namespaces need root")
    return LoopbackHosts(count)


class NamespaceHosts:
    """Hosts 10.83.0.1, 10.83.0.2, … in network namespaces."""

    def __init__(self, count: int) -> None:
        """Raises OSError if a namespace or a link is refused; nothing is left behind."""
        self.addresses = [f"{_SUBNET}.{host + 1}" for host in range(count)]
        self._switch = f"sempre-{os.getpid()}-switch"
        self._names = [f"sempre-{os.getpid()}-{host}" for host in range(count)]
        self._made: list[str] = []
        try:
            self._make(self._switch)
            self._ip(self._switch, "link add bridge type bridge")
            self._ip(self._switch, "link set bridge up")
            for host, name in enumerate(self._names):
                self._make(name)
                self._join(host, name)
        except BaseException:
            self.close()
            raise

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._names[host], *words]

    def cut_off(self, host: int) -> None:
        self._ip(self._switch, f"link set port{host} down")

    def reconnect(self, host: int) -> None:
        self._ip(self._switch, f"link set port{host} up")

    def close(self) -> None:
        while self._made:
            _run("ip", "netns", "delete", self._made.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _make(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)

    def _join(self, host: int, name: str) -> None:
        self._ip(self._switch, f"link add port{host} type veth peer name eth0 netns {name}")
        self._ip(self._switch, f"link set port{host} master bridge up")
        self._ip(name, "link set lo up")
        self._ip(name, f"address add {self.addresses[host]}/24 dev eth0")
        self._ip(name, "link set eth0 up")

    def _ip(self, name: str, words: str) -> None:
        _run("ip", "-netns", name, *words.split())


class LoopbackHosts:
    """Hosts 127.83.0.1, 127.83.0.2, …, all on this machine's network."""

    def __init__(self, count: int) -> None:
        self.addresses = [f"127.83.0.{host + 1}" for host in range(count)]

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        return list(words)

    def cut_off(self, host: int) -> None:
        raise OSError(f"host {host} ({self.addresses[host]}) is an address of the loopback and cannot be cut off")

    reconnect = cut_off

    def close(self) -> None:
        """Nothing was made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _run(*words: str) -> None:
    """Raises OSError with what the command said."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(f"{words[0]}: not found; install iproute2 for network namespaces") from error
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
