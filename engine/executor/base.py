"""The seam between the engine's core and its workers."""

from __future__ import annotations

from typing import Protocol

from sempre.engine.config import EngineConfig
from sempre.engine.speculation import max_draft_tokens
from sempre.ipc.errors import ProtocolError, SempreError
from sempre.ipc.messages import WorkerCommand, WorkerConfig, WorkerEvent, WorkerHealth


class Executor(Protocol):
    """Carries commands to the workers of all ranks and hands back their events.

    Nothing here blocks for long: a command is queued, its answer is a later event. Each worker answers its commands
    in the order in which they were sent, and says `WorkerHello` before anything else.
    """

    world_size: int

    def send(self, rank: int, command: WorkerCommand) -> None:
        """Queue a command. Raises WorkerDied."""

    def receive(self) -> tuple[int, WorkerEvent] | None:
        """The next event and the rank it comes from; None when there is none yet. Raises WorkerDied.

        While the workers start, an error of theirs is raised as its own type (ModelError, ConfigError, …), and
        StartupError when it has none.
        """

    def blame(self, rank: int, error: ProtocolError) -> SempreError:
        """End a worker whose event is wrong; the error to raise for it."""

    def health(self) -> list[WorkerHealth]:
        """What is known of each worker, in rank order."""

    def shutdown(self) -> None:
        """End all workers; returns when they are gone. May be called again."""


class RestartingExecutor(Executor, Protocol):
    """One whose workers can be replaced while the others go on."""

    def restart(self, rank: int, cause: str) -> None:
        """End the worker if it still runs and start another in its place, which begins with its `WorkerHello`.

        Until that one is ready, its failure is a WorkerDied too.
        """


# of a GPU's memory, for a draft worker that shares it
_DRAFT_SHARE = 0.08


def worker_config(config: EngineConfig, rank: int, num_threads: int, *, role: str = "target") -> WorkerConfig:
    """The share of worker `rank`: replicas are numbered first, then the ranks within a replica."""
    tp_size = config.tensor_parallel_size
    speculative = config.speculative_config
    colocated = speculative is not None and speculative.placement == "colocated" and speculative.model_path is not None
    share = config.gpu_memory_utilization
    if role == "draft":
        share = _DRAFT_SHARE
    elif speculative is not None and speculative.placement == "worker":
        share -= _DRAFT_SHARE
    return WorkerConfig(
        rank=rank,
        world_size=config.data_parallel_size * tp_size,
        dp_rank=rank // tp_size,
        tp_rank=rank % tp_size,
        tp_size=tp_size,
        role=role,
        seed=config.seed,
        model_path=str(config.model_path),
        dtype=config.dtype,
        device=config.device,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        num_threads=num_threads,
        numerics=config.numerics,
        load_format=config.load_format,
        heartbeat_interval_s=config.heartbeat_interval_s,
        gpu_memory_utilization=share,
        enforce_eager=config.enforce_eager,
        quantization=config.quantization,
        max_draft_tokens=max_draft_tokens(config),
        draft_model_path=str(speculative.model_path) if speculative is not None and colocated else None,
    )
