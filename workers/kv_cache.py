"""The paged KV cache of one worker: its size, its memory, and digests of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import WorkerConfig
from sempre.kernels.attention import KvCache, allocate_kv_cache
from sempre.kernels.fp8 import FP8
from sempre.kernels.states import LayerState
from sempre.workers.models.config import LayerKv
from sempre.workers.state_cache import CacheSizes, LayerTensors, StateCache, StateNeeds
from sempre.workers.tensor_source import CPU

# share of the free memory that the caches of all workers of a host may claim
MEMORY_SHARE = 0.4


def block_bytes(layers: Sequence[LayerKv], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in every layer that has its own, with their scales."""
    scale = torch.float32.itemsize if dtype is FP8 else 0
    row_bytes = [
        layer.num_kv_heads * (layer.head_dim * dtype.itemsize + scale) for layer in layers if layer.source is None
    ]
    return 2 * block_size * sum(row_bytes)


def available_sizes(
    config: WorkerConfig,
    bytes_per_block: int,
    states: StateNeeds,
    *,
    block_size: int,
    max_model_len: int,
    draft_bytes_per_block: int = 0,
    draft_state_bytes: int = 0,
) -> CacheSizes:
    """How many blocks, and slots of states, the worker can hold; raises ConfigError with the sums when not even one
    full sequence fits, or, where the config leaves `max_model_len` open, not even one block.

    `kv_cache_memory_bytes` decides; without it, room for as many sequences of `max_model_len` tokens as a step may
    have, within the worker's share of the free memory. `draft_bytes_per_block`: of these bytes, those for a draft
    model's keys and values; `draft_state_bytes`: those of all its states.
    """
    per_sequence = -(-max_model_len // block_size)
    share = draft_share(bytes_per_block, draft_bytes_per_block)
    if config.kv_cache_memory_bytes is not None:
        memory_bytes, origin = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
        free_bytes = available_memory_bytes()
        if memory_bytes > free_bytes:
            raise ConfigError(
                f"kv_cache_memory_bytes: expected at most the {free_bytes} bytes of free memory, found {memory_bytes}."
                " Lower it, or leave it out to have it sized.",
                parameter="kv_cache_memory_bytes",
                value=memory_bytes,
            )
        most_blocks = memory_bytes // bytes_per_block
    else:
        memory_bytes = int(MEMORY_SHARE * available_memory_bytes()) // config.world_size
        origin = f"{MEMORY_SHARE:.0%} of the free memory over {config.world_size} worker(s)"
        most_blocks = per_sequence * states.max_num_seqs
    if draft_state_bytes:
        origin += f" less {draft_state_bytes} bytes of the draft model's states"
        memory_bytes = max(0, memory_bytes - draft_state_bytes)
    num_slots = states.num_slots(memory_bytes, origin)
    num_blocks = min(most_blocks, (memory_bytes - num_slots * states.slot_bytes) // bytes_per_block)
    slots = f" less {num_slots} slots of states of {states.slot_bytes} bytes" if num_slots else ""
    if num_blocks < (1 if config.max_model_len is None else per_sequence):
        raise ConfigError(
            f"kv_cache_memory_bytes: one sequence of max_model_len={max_model_len} tokens needs {per_sequence} blocks"
            f" of {bytes_per_block} bytes{share} = {per_sequence * bytes_per_block} bytes; {origin} = {memory_bytes}"
            f" bytes{slots} holds {num_blocks} blocks. Lower max_model_len or raise kv_cache_memory_bytes.",
            parameter="kv_cache_memory_bytes",
            value=config.kv_cache_memory_bytes,
        )
    return CacheSizes(num_blocks, num_slots)


def draft_share(bytes_per_block: int, draft_bytes_per_block: int) -> str:
    """Return an error's note on a draft model's share of a block; empty without one."""
    if not draft_bytes_per_block:
        return ""
    share = draft_bytes_per_block / bytes_per_block
    return f" ({share:.0%} of that for the draft model)"


def available_memory_bytes() -> int:
    """Free memory of the host, or of the control group that limits this process, whichever is less."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, current = group / "memory.max", group / "memory.current"
    if limit.exists() and current.exists() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the kernel drops file pages on demand
        used = int(current.read_text()) - int(stat["inactive_file"])
        available = min(available, max(0, int(text) - used))
    return available


class PagedKvCache(LayerTensors):
    """One cache per layer, addressed by the same block ids. Memory is resident once a block is written."""

    layers: list[KvCache | LayerState]
    """of each layer; one that reads another's has the same, one that keeps states has its part of those, and that of
    another stage an empty one"""

    def __init__(
        self,
        layers: Sequence[LayerKv],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        states: StateCache | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        own = {
            index: allocate_kv_cache(num_blocks, layer.num_kv_heads, layer.head_dim, block_size, dtype, device)
            for index, layer in enumerate(layers)
            if layer.source is None and layer.num_kv_heads
        }
        self.states = states
        kept: dict[int, KvCache | LayerState] = {**own, **({} if states is None else states.layers)}
        sources = [index if layer.source is None else layer.source for index, layer in enumerate(layers)]
        nothing = KvCache(*torch.empty(2, 0, dtype=torch.float32, device=device))
        self.layers = [kept.get(source, nothing) for source in sources]
        super().__init__(layer.tensors for layer in own.values())
