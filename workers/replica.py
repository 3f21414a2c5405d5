"""A worker's place in its replica."""

from __future__ import annotations

from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import WorkerConfig
from sempre.ipc.rank_links import RankLinks
from sempre.workers.backend import Backend, LoadedModel
from sempre.workers.layers.module import Build
from sempre.workers.models.base import CausalLM
from sempre.workers.models.registry import build_model
from sempre.workers.parallel import Parallel, parallel_of
from sempre.workers.quantization.plain import NotQuantized


def join_replica(
    config: WorkerConfig, backend: Backend, shared_memory: int | None, links: RankLinks | None
) -> Parallel:
    """Join the other ranks, if any, by a file descriptor that those of this host have, and by links to those of others.
    Raises ConfigError where the device cannot."""
    if config.replica_size == 1:
        return parallel_of(config.profile)
    if shared_memory is None:
        others = config.replica_size - 1
        raise ProtocolError(f"worker: expected memory to share with the other {others} rank(s), found none.")
    if (links is not None) != config.crosses_nodes(config.rank):
        raise ProtocolError("worker: expected links to other hosts where the replica has ranks there, and only then.")
    return backend.join(config, shared_memory, links)


def whole_model(loaded: LoadedModel) -> CausalLM:
    """The model as one worker would have it, possibly without tensors."""
    if loaded.parallel.is_alone:
        return loaded.model
    return build_model(Build(loaded.kernel, NotQuantized()), loaded.spec)
