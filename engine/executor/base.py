"""The interface between the engine's core and its workers."""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import asdict

from sempre.ipc.config import EngineConfig, WorkerConfig
from sempre.ipc.errors import ProtocolError, RanksDiffer, SempreError
from sempre.ipc.messages import WorkerCommand, WorkerEvent, WorkerHealth


class Executor(Protocol):
    """Sends commands to the workers of all ranks and returns their events.

    Ranks [0, world_size) are targets; those of `draft_ranks` follow. Nothing here blocks for long: a command is queued,
    and its answer is a later event. Each worker first sends `WorkerHello`, then answers its commands in order.
    """

    world_size: int

    def send(self, rank: int, command: WorkerCommand) -> None:
        """Queue a command. Raises WorkerDied."""

    def receive(self) -> tuple[int, WorkerEvent] | None:
        """The next event and its rank; None if there is none yet. Raises WorkerDied.

        While the workers start, their errors are raised as their own types (ModelError, ConfigError, …), or else as
        StartupError.
        """

    def blame(self, rank: int, error: ProtocolError | RanksDiffer) -> SempreError:
        """End a worker that sent a wrong event, or another result than its peers; return the error to raise."""

    def health(self) -> list[WorkerHealth]:
        """The health of each worker, in rank order; a draft worker that was given up has none."""

    def restart(self, rank: int, cause: str) -> None:
        """End the worker if it still runs and start a successor, which begins with its `WorkerHello`.

        Until the successor is ready, its failure is a WorkerDied too.
        """

    def abandon(self, rank: int) -> None:
        """End the worker if it still runs, without a successor."""

    def shutdown(self) -> None:
        """End all workers; returns when they are gone. Can be called twice."""


# fraction of a GPU's memory for a draft worker that shares it
_DRAFT_SHARE = 0.08


def draft_ranks(config: EngineConfig) -> range:
    """The ranks of draft workers, one for each replica; they follow those of the targets."""
    speculative, first = config.speculative_config, config.world_size
    has_drafts = speculative is not None and speculative.placement == "worker"
    return range(first, first + (config.data_parallel_size if has_drafts else 0))


def device_index(config: EngineConfig, rank: int) -> int:
    """The GPU of a worker; a draft worker shares that of the first rank of its replica."""
    return _target_rank(config, rank) % config.ranks_per_node


def node_of(config: EngineConfig, rank: int) -> int:
    """The host of a worker; a draft worker is on that of the first rank of its replica."""
    return _target_rank(config, rank) // config.ranks_per_node


def _target_rank(config: EngineConfig, rank: int) -> int:
    """The rank itself, or for a draft worker the first rank of its replica."""
    drafts = draft_ranks(config)
    return drafts.index(rank) * config.replica_size if rank in drafts else rank


def worker_name(config: EngineConfig, rank: int) -> str:
    """A worker's name in messages."""
    drafts = draft_ranks(config)
    return f"draft worker {drafts.index(rank)}" if rank in drafts else f"worker {rank}"


def worker_config(config: EngineConfig, rank: int, num_threads: int) -> WorkerConfig:
    """The settings of worker `rank`: replicas are numbered first, then the stages of a replica, then the
    ranks of a stage."""
    settings = asdict(config) | {"num_threads": num_threads}
    speculative = config.speculative_config
    if rank in draft_ranks(config):
        assert speculative is not None
        settings |= {
            "role": "draft",
            "model_path": speculative.model_path,
            "weights_path": None,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "nnodes": 1,
            "numerics_profile": "single",
            "quantization": None,
            "gpu_memory_utilization": _DRAFT_SHARE,
            "speculative_config": None,
        }
    elif draft_ranks(config):
        settings["gpu_memory_utilization"] -= _DRAFT_SHARE
    return WorkerConfig(rank=rank, device_index=device_index(config, rank), **settings)
