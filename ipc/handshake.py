"""What the first message of a peer must say before it is accepted."""

from __future__ import annotations

from sempre.ipc.errors import MessageMalformed, VersionMismatch
from sempre.ipc.messages import PROTOCOL_VERSION, ClientHello, WorkerHello


def check_version(hello: ClientHello | WorkerHello) -> None:
    """Raises VersionMismatch."""
    if hello.protocol_version != PROTOCOL_VERSION:
        name = type(hello).__name__
        raise VersionMismatch(
            f"{name}.protocol_version: expected {PROTOCOL_VERSION}, found {hello.protocol_version}; "
            "both processes must run the same installation",
            expected=PROTOCOL_VERSION,
            found=hello.protocol_version,
        )


def check_pid(hello: ClientHello | WorkerHello, expected: int) -> None:
    """Raises MessageMalformed when another process than the expected one says hello."""
    if hello.pid != expected:
        field = f"{type(hello).__name__}.pid"
        raise MessageMalformed(f"{field}: expected {expected}, found {hello.pid}", field=field)
