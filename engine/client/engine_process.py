"""The coordinator process and its private folder, owned by the user's process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sempre.engine.child_process import ChildProcess, child_environment
from sempre.engine.coordinator.process import CoordinatorArguments
from sempre.ipc.config import EngineConfig
from sempre.ipc.curve import make_key_file
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.error_info import restore
from sempre.ipc.errors import ConfigError, CoordinatorDied, EngineDeadError, ProtocolError, SempreError
from sempre.ipc.messages import ClientEvent, EngineFailed, EngineReady, Heartbeat, Refused

_GOODBYE_S = 5.0
_ALIKE = (
    "vocab_size",
    "max_model_len",
    "eos_token_ids",
    "block_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "world_size",
    "fingerprint",
)
"""What an engine that is started again has in common with the former one, of EngineReady."""


@dataclass(frozen=True)
class ProcessOptions:
    """Addresses of the processes; users get the defaults.

    `directory` is created if None; `client_connect` and `worker_connect` put a proxy in between.
    """

    worker_module: str = "sempre.workers"
    directory: PrivateDirectory | None = None
    client_connect: str | None = None
    worker_connect: str | None = None


class EngineProcess:
    """Starts the coordinator on construction; `directory` may be that of a previous one."""

    def __init__(self, config: EngineConfig, options: ProcessOptions, directory: PrivateDirectory) -> None:
        self.directory = directory
        self.client_address = options.client_connect or self.directory.client_address
        self._owner_pid = os.getpid()
        arguments = CoordinatorArguments(
            config=config,
            directory=str(self.directory.path),
            client_pid=self._owner_pid,
            worker_module=options.worker_module,
            worker_connect=options.worker_connect,
        )
        self.child = ChildProcess(
            "sempre.engine.coordinator",
            [],
            log_path=self.directory.log_path("coordinator"),
            environment=child_environment(),
            stdin=msgspec.json.encode(arguments) + b"\n",
            own_group=True,
        )

    def is_inherited(self) -> bool:
        """Whether this is a forked copy of the process that started the engine."""
        return os.getpid() != self._owner_pid

    def death(self, cause: str | None = None) -> CoordinatorDied:
        """End the rest of the engine and return the error with the cause; `cause` is set if we ended it."""
        self.child.kill_group()
        ending = self.child.describe_exit()
        text = f"the coordinator (pid {self.child.pid}) died: {ending}" + (f"; {cause}" if cause else "")
        return CoordinatorDied(
            f"{text}\n{self.child.log_tail()}".rstrip(), exitcode=self.child.exitcode(), cause=cause or ending
        )

    def bury(self) -> None:
        """Make sure that none of its processes run; the folder stays for a successor."""
        self.child.kill_group()
        self.child.close()

    def end(self) -> None:
        """Wait for the requested exit, enforce it, and remove the folder."""
        if self.child.ended() or self.child.wait(_GOODBYE_S) is None:
            self.child.kill_group()
        self.child.close()
        self.directory.remove()


def prepare_hosts(config: EngineConfig, directory: PrivateDirectory) -> None:
    """Write the file of keys that the hosts of an engine have in common, if there is none; it is deleted with
    `directory`. Raises ConfigError, also on a host that only has workers."""
    if config.node_rank:
        raise ConfigError(
            f"node_rank={config.node_rank}: only host 0 has an engine to use. Run `sempre serve --headless` here.",
            parameter="node_rank",
            value=config.node_rank,
        )
    if config.nnodes > 1 and config.node_key_file is not None and make_key_file(Path(config.node_key_file)):
        directory.own(Path(config.node_key_file))


def client_event(event: ClientEvent) -> ClientEvent | None:
    """The event, or None if it is for the client itself. Raises the errors in EngineFailed and Refused."""
    match event:
        case Heartbeat():
            return None
        case EngineFailed(error=info):
            text = f"the engine failed: {info.type}: {info.message}\n{info.traceback}".rstrip()
            raise restore(info) or CoordinatorDied(text, cause=f"{info.type}: {info.message}")
        case Refused(error=info):
            raise restore(info) or ProtocolError(f"the coordinator refused a frame: {info.type}: {info.message}")
        case _:
            return event


def ended_by(error: BaseException) -> EngineDeadError:
    """The error for using an engine that has ended."""
    if isinstance(error, EngineDeadError):
        return error
    kind = "" if isinstance(error, SempreError) else f"{type(error).__name__}: "
    return CoordinatorDied(f"the engine has ended: {kind}{error}", cause=f"{kind}{error}")


def check_alike(former: EngineReady, ready: EngineReady) -> None:
    """Raise CoordinatorDied if a restarted engine differs from the former one."""
    for field in _ALIKE:
        expected, found = getattr(former, field), getattr(ready, field)
        if expected != found:
            text = f"the restarted engine differs in {field}: expected {expected}, found {found}"
            raise CoordinatorDied(text, cause=text)
