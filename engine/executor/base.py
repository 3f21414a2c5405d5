"""The seam between the engine's core and its workers."""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import replace

from sempre.engine.config import EngineConfig
from sempre.engine.speculation import max_draft_tokens
from sempre.ipc.errors import ProtocolError, SempreError
from sempre.ipc.messages import WorkerCommand, WorkerConfig, WorkerEvent, WorkerHealth


class Executor(Protocol):
    """Carries commands to the workers of all ranks and hands back their events.

    Ranks [0, world_size) are targets; those of `draft_ranks` follow. Nothing here blocks for long: a command is queued,
    its answer is a later event. Each worker answers its commands in the order in which they were sent, and says
    `WorkerHello` before anything else.
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
        """What is known of each target, in rank order."""

    def restart(self, rank: int, cause: str) -> None:
        """End the worker if it still runs and start another in its place, which begins with its `WorkerHello`.

        Until that one is ready, its failure is a WorkerDied too.
        """

    def abandon(self, rank: int) -> None:
        """End the worker if it still runs; this rank has none from now on."""

    def shutdown(self) -> None:
        """End all workers; returns when they are gone. May be called again."""


# of a GPU's memory, for a draft worker that shares it
_DRAFT_SHARE = 0.08


def draft_ranks(config: EngineConfig) -> range:
    """The ranks of draft workers, one for each replica; they follow those of the targets."""
    num_targets = config.data_parallel_size * config.tensor_parallel_size
    speculative = config.speculative_config
    has_drafts = speculative is not None and speculative.placement == "worker"
    return range(num_targets, num_targets + (config.data_parallel_size if has_drafts else 0))


def device_index(config: EngineConfig, rank: int) -> int:
    """The GPU of a worker; a draft worker shares that of the first rank of its replica."""
    drafts = draft_ranks(config)
    return drafts.index(rank) * config.tensor_parallel_size if rank in drafts else rank


def worker_name(config: EngineConfig, rank: int) -> str:
    """As a worker is called in messages."""
    drafts = draft_ranks(config)
    return f"draft worker {drafts.index(rank)}" if rank in drafts else f"worker {rank}"


def worker_config(config: EngineConfig, rank: int, num_threads: int) -> WorkerConfig:
    """The share of worker `rank`: replicas are numbered first, then the ranks within a replica."""
    drafts = draft_ranks(config)
    if rank not in drafts:
        return _target_config(config, rank, num_threads)
    speculative = config.speculative_config
    assert speculative is not None
    return replace(
        _target_config(config, device_index(config, rank), num_threads),
        rank=rank,
        tp_size=1,
        role="draft",
        model_path=str(speculative.model_path),
        gpu_memory_utilization=_DRAFT_SHARE,
        quantization=None,
        max_draft_tokens=0,
    )


def _target_config(config: EngineConfig, rank: int, num_threads: int) -> WorkerConfig:
    tp_size = config.tensor_parallel_size
    speculative = config.speculative_config
    colocated = speculative is not None and speculative.placement == "colocated" and speculative.model_path is not None
    share = config.gpu_memory_utilization
    if draft_ranks(config):
        share -= _DRAFT_SHARE
    return WorkerConfig(
        rank=rank,
        world_size=config.data_parallel_size * tp_size,
        dp_rank=rank // tp_size,
        tp_rank=rank % tp_size,
        tp_size=tp_size,
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
        device_index=rank,
        draft_model_path=str(speculative.model_path) if speculative is not None and colocated else None,
    )
