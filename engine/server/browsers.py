"""Prevents pages of other sites from using a server without keys.

A browser sends requests for any page that it shows. Two headers distinguish them from the operator's own:

- `Origin` is the page's site: it must be this server's own, or one of `allowed_origins`. Programs send none.
- `Host` is the name of the server in the page's address. A site can point its own name at a local address and then
  has the same origin as the server; but no site has an IP address, `localhost`, a name without a dot, or a suffix
  that is never registered. Other names need `allowed_hosts`, or a proxy that forwards requests of programs (and says
  so in a header).
"""

from __future__ import annotations

import ipaddress
import socket
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError

_NEVER_REGISTERED = (".localhost", ".local", ".internal", ".svc", ".home.arpa", ".test")
_OF_PROXIES = ("x-forwarded-for", "forwarded", "via")
_OF_BROWSERS = ("origin", "sec-fetch-site", "referer")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_SHOWN = 100


class PageGuard:
    """Decides which requests a server without keys accepts."""

    def __init__(self, config: ServerConfig) -> None:
        self._origins = frozenset(origin.rstrip("/").lower() for origin in config.allowed_origins)
        names = (config.host, socket.gethostname(), *config.allowed_hosts)
        self._hosts = tuple(name.rstrip(".").lower() for name in names)
        self._is_open = "*" in self._origins or config.uds is not None

    def check(self, headers: Headers) -> APIError | None:
        """Return the error if the request is refused."""
        if self._is_open:
            return None
        origin = headers.get("origin", "").rstrip("/").lower()
        if origin in self._origins:
            return None
        host = headers.get("host", "").lower()
        if host and not self._is_host(_name(host)) and not _is_of_a_program_behind_a_proxy(headers):
            return APIError(
                403,
                f"This server has no key, so it cannot be called as {host[:_SHOWN]!r}: any site could use that name. "
                "Start it with --allowed-hosts NAME (or a key), or call it by an address.",
            )
        if origin and not _is_same(origin, host) and not _is_same(origin, headers.get("x-forwarded-host", "").lower()):
            return APIError(
                403,
                f"This server has no key, so a page of {origin[:_SHOWN]!r} cannot call it. Start it with "
                "--allowed-origins ORIGIN, or with a key.",
            )
        return None

    def _is_host(self, name: str) -> bool:
        if "." not in name or name.endswith(_NEVER_REGISTERED):
            return True
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return any(fnmatchcase(name, pattern) for pattern in self._hosts)
        return True


def _name(host: str) -> str:
    """Return a Host header without its port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_same(origin: str, host: str) -> bool:
    try:
        found = urlsplit(origin)
    except ValueError:
        return False
    port = _DEFAULT_PORTS.get(found.scheme)
    if port is None or not host:
        return False
    return found.netloc.removesuffix(port) == host.removesuffix(port)


def _is_of_a_program_behind_a_proxy(headers: Headers) -> bool:
    is_browser = any(name in headers for name in _OF_BROWSERS) or headers.get("user-agent", "").startswith("Mozilla/")
    return not is_browser and any(name in headers for name in _OF_PROXIES)
