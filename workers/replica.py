"""A worker's place in its replica."""

from __future__ import annotations

from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import WorkerConfig
from sempre.workers.backend import Backend, LoadedModel
from sempre.workers.layers.module import Build
from sempre.workers.models.base import CausalLM
from sempre.workers.models.registry import build_model
from sempre.workers.parallel import Parallel, parallel_of
from sempre.workers.quantization.plain import NotQuantized


def join_replica(config: WorkerConfig, backend: Backend, shared_memory: int | None) -> Parallel:
    """Join the other ranks, if any, by a file descriptor that all have. Raises ConfigError where the device cannot."""
    size = config.tensor_parallel_size
    if size == 1:
        return parallel_of(config.profile)
    if shared_memory is None:
        raise ProtocolError(f"worker: expected memory to share with the other {size - 1} rank(s), found none.")
    return backend.join(config, shared_memory)


def whole_model(loaded: LoadedModel) -> CausalLM:
    """The model as one worker would have it, possibly without tensors."""
    if loaded.parallel.size == 1:
        return loaded.model
    return build_model(Build(loaded.kernel, NotQuantized()), loaded.spec)
