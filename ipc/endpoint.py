"""Addresses: of other hosts, and the private directory that holds one engine's sockets and its processes' logs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sempre.ipc.errors import StartupError

# AF_UNIX paths are at most 107 bytes; this is the longest name in use, a proxy of the test harness
_LONGEST_SOCKET_NAME = "/sempre-12345678/workers-proxy.sock"
_AF_UNIX_LIMIT = 107


def tcp_endpoint(address: str, port: int | str) -> str:
    """The ZeroMQ address of an IP address and a port, or * for a free one."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


class PrivateDirectory:
    """A folder of mode 0700 on a local file system; `remove` deletes it with everything in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owned: list[Path] = []

    @classmethod
    def create(cls) -> PrivateDirectory:
        """Under XDG_RUNTIME_DIR, else the temporary folder. Raises StartupError when no path is short enough."""
        candidates = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
        for parent in candidates:
            fits = len(os.fsencode(parent + _LONGEST_SOCKET_NAME)) <= _AF_UNIX_LIMIT
            if parent and fits and os.access(parent, os.W_OK | os.X_OK):
                return cls(Path(tempfile.mkdtemp(prefix="sempre-", dir=parent)))
        raise StartupError(
            f"no folder for sockets: each of {candidates} is not writable or longer than a socket path may be "
            f"({_AF_UNIX_LIMIT} bytes); set XDG_RUNTIME_DIR to a short, writable folder"
        )

    @property
    def client_address(self) -> str:
        return f"ipc://{self.path}/client.sock"

    @property
    def worker_address(self) -> str:
        return f"ipc://{self.path}/workers.sock"

    def log_path(self, process_name: str) -> Path:
        return self.path / f"{process_name}.log"

    def own(self, file: Path) -> None:
        """Delete it, too, which lies elsewhere."""
        self._owned.append(file)

    def remove(self) -> None:
        for file in self._owned:
            file.unlink(missing_ok=True)
        # the other side may be removing it too
        shutil.rmtree(self.path, ignore_errors=True)
