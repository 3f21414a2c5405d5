"""Starts worker processes on this host, for its coordinator or for that of another host."""

from __future__ import annotations

import os

import msgspec

from sempre.engine.child_process import ChildProcess, child_environment
from sempre.engine.executor.replica_memory import ReplicaMemory
from sempre.engine.executor.threads import thread_variables
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.messages import StartWorker


class WorkerStarter:
    """The workers end with this process, which has started them, and with `client_pid`.

    `host` is where they listen, if ranks on other hosts are to reach them.
    """

    def __init__(
        self, directory: PrivateDirectory, *, client_pid: int, replica_size: int, worker_module: str, host: str = ""
    ) -> None:
        self._directory = directory
        self._client_pid = client_pid
        self._worker_module = worker_module
        self._host = host
        # the ranks of a replica restart together, each as often as the others
        self._memory = ReplicaMemory(replica_size)
        self._environment = child_environment()

    def start(self, command: StartWorker) -> ChildProcess:
        """Raises OSError."""
        arguments = ["--connect", command.hub_address, "--rank", str(command.rank), "--device", command.device]
        arguments += ["--device-index", str(command.device_index)]
        arguments += ["--parent-pid", str(os.getpid()), "--client-pid", str(self._client_pid)]
        arguments += ["--heartbeat-interval-s", repr(command.heartbeat_interval_s)]
        arguments += ["--max-message-bytes", str(command.max_message_bytes)]
        keys = b""
        if command.keys is not None:
            # not on the command line, where every user could read them
            arguments += ["--keys-from-stdin", "--listen", self._host]
            keys = msgspec.json.encode(command.keys) + b"\n"
        shared = self._memory.descriptor(command.rank, command.start) if command.shares_memory else None
        if shared is not None:
            arguments += ["--shared-memory", str(shared)]
        return ChildProcess(
            self._worker_module,
            arguments,
            log_path=self._directory.log_path(command.name.replace(" ", "-")),
            environment=self._environment | thread_variables(command.num_threads),
            stdin=keys,
            pass_fds=[] if shared is None else [shared],
        )

    def close(self) -> None:
        """Can be called twice."""
        self._memory.close()
